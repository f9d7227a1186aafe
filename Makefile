# `make demo` and `make test` work on a machine with python3 (3.11 or later) and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# A process for each core, of one thread each: more threads than cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

.PHONY: help demo test test-long fuzz lint check format benchmarks clean

help:
	@echo "make demo        decompose, train, convert and merge the fixture model, and compare every station"
	@echo "make test        the tests"
	@echo "make test-long   200 runs of each kind killed at random moments, 20,000 damaged files (long)"
	@echo "make fuzz        damaged files guided by coverage, where atheris is installed (10 minutes)"
	@echo "make check       format, lint, types, import layers and tests: before every commit"
	@echo "make benchmarks  ours beside PEFT's (minutes; see benchmarks/README.md)"
	@echo "make clean       remove the environment and all that was made"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(PYTEST)

test-long: $(READY)
	CORDA_CONVERT_KILLS=200 $(PYTEST) -v tests/test_resume.py tests/test_collect.py -k "killed or several"
	CORDA_CONVERT_FUZZ=20000 $(PYTEST) -v tests/test_fuzz.py
	$(BIN)/python tests/fuzzing/coverage_guided.py --seconds 120

fuzz: $(READY)
	$(BIN)/python tests/fuzzing/coverage_guided.py --seconds 600

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmarks: $(READY)
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/decompose.py

clean:
	rm -rf $(VENV) demo-output benchmarks/work .pytest_cache .mypy_cache .ruff_cache .hypothesis
