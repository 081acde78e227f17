# Everything sets itself up: the environment is made on first use and again only when its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo check test test-slow bench format clean

help:  ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

setup: $(STAMP)  ## make the environment

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lint,peers,slurm,ray]'
	touch $@

demo: $(STAMP)  ## the main job: a sweep over the four factors, and its report
	$(BIN)/harness run experiment=quick

check: $(STAMP)  ## format, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP)  ## the tests, in less than ten minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not slow and not cuda' -p no:benchmark \
	  -n 2 --dist loadfile --ignore tests/end_to_end
	$(BIN)/python -m pytest -q -m 'not slow and not cuda' -p no:benchmark tests/end_to_end

test-slow: $(STAMP)  ## the slow ones
	$(BIN)/python -m pytest -q -m 'slow and not cuda' -p no:benchmark

# Shapes are not checked here, as they are in the tests: the check would be timed too.
bench: $(STAMP)  ## how long the operators take; BENCH='-k hash' for some of them
	$(BIN)/python -m pytest -q --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=name \
	  --confcutdir=tests/benchmarks tests/benchmarks/test_operators.py $(BENCH)

format: $(STAMP)  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and the caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
