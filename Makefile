# Two commands to start with: `make sample` draws guided digits, `make test` proves the rest.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/installed

# One thread per process: with tiny models, threads of two workers only get in each other's way.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS)

.PHONY: sample test test-slow lint clean

sample: $(READY)
	$(BIN)/python benchmarks/sample_grid.py

test: $(READY)
	$(PYTEST) -q

test-slow: $(READY)
	$(PYTEST) -q -m slow --timeout 3600

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
