# Three commands to start with: `make demo` opens the models in a browser, `make sample` draws guided digits, `make test`
# proves the rest.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/installed
# Beside the environment: torchao prints a line wherever it is found.
TORCHAO := .venv/torchao
BROWSER := .venv/browser
INSTALL_CHROMIUM := { test "$$(id -u)" = 0 && apt-get update --quiet && \
	DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends chromium fonts-dejavu-core; }

# More threads gain little on networks this small, and on a busy machine they wait for each other.
export OMP_NUM_THREADS ?= 1
# Where the tests of the demo leave pictures of what they saw.
export DIFFUSERS_EXT_SCREENSHOTS ?= runs/browser

.PHONY: demo sample test test-slow test-demo browser screenshots lint clean

demo: $(READY)
	$(BIN)/python demo/app.py

sample: $(READY)
	$(BIN)/python benchmarks/sample_grid.py

test: $(READY) $(TORCHAO)
	$(BIN)/python -m pytest --quiet --numprocesses $(WORKERS)
	PYTHONPATH=$(TORCHAO) $(BIN)/python -m pytest --quiet -k quantised tests/test_interoperability.py

test-slow: $(READY)
	$(BIN)/python -m pytest --quiet --numprocesses $(WORKERS) -m slow --timeout 3600

# The demo as people use it: in headless Chromium, and by twenty clients at once for two minutes. Without `make browser`
# the tests in Chromium are skipped.
test-demo: $(READY)
	$(BIN)/python -m pytest --quiet -m "browser or load" -rs

# Playwright drives the Chromium that the system has; where there is none, root gets Debian's package.
browser: $(BROWSER)
	@command -v chromium || command -v chromium-browser || command -v google-chrome || $(INSTALL_CHROMIUM) || \
		{ echo "Chromium is missing: as root, apt-get install chromium fonts-dejavu-core"; exit 1; }

# The pictures in demo/screenshots, of the page as it is now.
screenshots: browser
	$(BIN)/python benchmarks/demo_screenshots.py

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

$(BROWSER): $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[browser]"
	@touch $@
