# Each target sets itself up: a virtual environment in .venv with the exact versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
QUIET := --quiet
export CUDA

export OMP_NUM_THREADS ?= 1
# A container may forbid bytecode: each worker and each process of a test would then compile every file again.
export PYTHONDONTWRITEBYTECODE :=
# Nothing here calls home; ray's metrics and the hub's telemetry stay off.
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0

OLDEST := .venv-oldest
OLDEST_ENGINE := .venv-oldest-engine
NEWEST := .venv-newest
NEWEST_PYTHON ?= $(shell for each in python3.14 python3.13 python3.12; do $$each --version > /dev/null 2>&1 && echo $$each && break; done)
OLD_WARNINGS := -W ignore::DeprecationWarning -W ignore::FutureWarning -W ignore::PendingDeprecationWarning
# What the licence of anything that batchtrim needs may be; GPL in any form may not be part of one.
LICENCES := MIT;BSD;Apache;ISC;Python Software Foundation;PSF;Mozilla;MPL
# What a bare environment with the lab extra can run: without the shared engine, which needs ENGINE_TORCH; and that engine
CORE := $(filter-out tests/test_docs.py,$(wildcard tests/test_*.py)) tests/distributed/test_scope.py tests/lab \
  $(filter-out src/batchtrim/testing.py,$(wildcard src/batchtrim/*.py))
ENGINE := tests/engine tests/test_testing.py tests/test_accumulation.py src/batchtrim/engine/*.py src/batchtrim/testing.py
ENGINE_TORCH := 2.8.0

.PHONY: demo test test-slow test-all check licences audit matrix fuzz docs bench constraints clean

demo: $(VENV)/.lab  ## train full and trim on handwritten digits, 5 seeds each, and write a report under runs/
	$(BIN)/batchtrim demo $(ARGS)

test: $(VENV)/.dev  ## the default tests, 80 seconds on two idle cores of 2.5 GHz
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/.docs  ## whole tables of cases, and long property, compile, browser and multi-process tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

test-all: test test-slow

check: $(VENV)/.dev  ## ruff, pyright, the layers of imports, the lengths of files and functions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python .ci/sizes.py

licences: $(VENV)/.dev  ## the licences of all that the package and its extras need
	$(BIN)/pip-licenses --from=mixed --partial-match --allow-only="$(LICENCES)" \
	  --packages $$($(BIN)/python .ci/runtime.py) > /dev/null
	$(BIN)/pip-licenses --from=mixed --partial-match --fail-on="GPL;General Public" --format=plain \
	  --packages $$($(BIN)/python .ci/runtime.py)

audit: $(VENV)/.dev  ## known vulnerabilities of the pinned versions; asks an advisory service, so it needs a network
	$(PIP) $(QUIET) pip-audit
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

matrix: $(VENV)/.dev  ## the tests with the oldest versions allowed, and on the newest Python found (downloads gigabytes)
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $$($(BIN)/python .ci/requirements.py --oldest)
	# warnings of old libraries about new ones say nothing about batchtrim
	PYTHONPATH=$(CURDIR)/src $(OLDEST)/bin/python -m pytest -n 2 -m "not slow" $(OLD_WARNINGS) $(CORE)
	test -x $(OLDEST_ENGINE)/bin/python || $(PYTHON) -m venv $(OLDEST_ENGINE)
	$(OLDEST_ENGINE)/bin/python -m pip install --quiet torch==$(ENGINE_TORCH) numpy \
	  $$($(BIN)/python .ci/requirements.py --group test)
	PYTHONPATH=$(CURDIR)/src $(OLDEST_ENGINE)/bin/python -m pytest -n 2 -m "not slow" $(OLD_WARNINGS) $(ENGINE)
	test -n "$(NEWEST_PYTHON)" || { echo "no Python newer than 3.11 was found. Run: make matrix NEWEST_PYTHON=python3.13"; exit 1; }
	test -x $(NEWEST)/bin/python || $(NEWEST_PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet -c constraints.txt $$($(BIN)/python .ci/requirements.py)
	PYTHONPATH=$(CURDIR)/src $(NEWEST)/bin/python -m pytest -n 2 -m "not slow" $(CORE) $(ENGINE)

fuzz: $(VENV)/.dev  ## look for inputs that break out of the documented errors, for about 20 minutes
	BATCHTRIM_FUZZ=$${BATCHTRIM_FUZZ:-4000} $(BIN)/python -m pytest -n 2 --timeout 3600 tests/fuzz

docs: $(VENV)/.docs  ## the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # not --quiet: it does not count warnings then

bench: $(VENV)/.dev  ## every number the documentation states about cost; run it on an idle machine
	$(BIN)/python -m benchmarks $(ARGS)

constraints: $(VENV)/.dev $(VENV)/.docs  ## write what is installed now into constraints.txt
	$(PIP) $(QUIET) pip-audit
	{ head -1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -v ' @ ' | sed 's/+cpu$$//' | sort -f; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) $(OLDEST) $(OLDEST_ENGINE) $(NEWEST) build dist site .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "batchtrim needs Python 3.11 or newer, got $$($(PYTHON) --version). Run: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes in first and pinned: left to a dependency, pip may pick another build of several gigabytes
$(VENV)/.lab: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python .ci/cuda.py
	@echo "installing torch and the lab into $(VENV): about 1.5 GB without CUDA, once"
	$(PIP) torch
	$(PIP) -e '.[lab]'
	@touch $@

$(VENV)/.dev: $(VENV)/.lab
	$(PIP) $(QUIET) -e '.[all]' $$($(BIN)/python .ci/requirements.py --group dev)
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) $(QUIET) $$($(BIN)/python .ci/requirements.py --group docs)
	@touch $@
