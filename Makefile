# Each target sets itself up: a virtual environment in .venv with the exact versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

export OMP_NUM_THREADS ?= 1
# Nothing here calls home; ray's metrics and the hub's telemetry stay off.
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test test-slow test-all check docs bench constraints clean

demo: $(VENV)/.lab  ## train full and trim on handwritten digits, 5 seeds each, and write a report under runs/
	$(BIN)/batchtrim demo $(ARGS)

test: $(VENV)/.dev  ## the default tests, about a minute
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev  ## long property, compile, browser and multi-process tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

test-all: test test-slow

check: $(VENV)/.dev  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.docs  ## the documentation site, into site/
	$(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.dev  ## every number the documentation states about cost; run it on an idle machine
	$(BIN)/python -m benchmarks $(ARGS)

constraints: $(VENV)/.dev $(VENV)/.docs  ## write what is installed now into constraints.txt
	{ head -1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -v ' @ ' | sed 's/+cpu$$//' | sort -f; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "batchtrim needs Python 3.11 or newer, got $$($(PYTHON) --version). Run: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes in first and pinned: left to a dependency, pip may pick another build of several gigabytes
$(VENV)/.lab: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e '.[lab]'
	@touch $@

$(VENV)/.dev: $(VENV)/.lab
	$(PIP) -e '.[all]' hypothesis 'pyright[nodejs]' pytest pytest-timeout pytest-xdist ruff cleanlab
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) mkdocs-material 'mkdocstrings[python]' nbclient ipykernel
	@touch $@
