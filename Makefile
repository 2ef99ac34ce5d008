# Two commands to start with: `make sample` draws guided digits, `make test` proves the rest.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/installed
# Beside the environment: torchao prints a line wherever it is found.
TORCHAO := .venv/torchao

# More threads gain little on networks this small, and on a busy machine they wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: sample test test-slow lint clean

sample: $(READY)
	$(BIN)/python benchmarks/sample_grid.py

test: $(READY) $(TORCHAO)
	$(BIN)/python -m pytest --quiet --numprocesses $(WORKERS)
	PYTHONPATH=$(TORCHAO) $(BIN)/python -m pytest --quiet -k quantised tests/test_interoperability.py

test-slow: $(READY)
	$(BIN)/python -m pytest --quiet --numprocesses $(WORKERS) -m slow --timeout 3600

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build dist samples *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	@echo "Installing diffusers_ext into .venv (a few minutes the first time) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(TORCHAO): $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --constraint constraints.txt \
		--upgrade --target $@ torchao || { echo "Without torchao: its tests are skipped."; mkdir -p $@; }
	@touch $@
