# Every target makes the virtual environment that it needs: a fresh checkout needs only Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# Two workers with one thread each beat one worker with two: most tests are small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS ?= 2

.PHONY: help install demo test test-slow test-wheel test-versions mutants docs lint format types check clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /: /'

install: $(VENV)/.installed ## make the virtual environment with everything in it

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all,dev]'
	touch $@

demo: install ## train, diagnose, convert, train on the spheres, give back: a few minutes
	$(BIN)/python examples/demo.py

test: install ## the fast tests and the examples in the docstrings
	$(PYTEST) -m 'not slow' -n $(WORKERS) --dist worksteal

test-slow: install ## the tests that take more than a few seconds each
	$(PYTEST) -m slow -n $(WORKERS) --dist worksteal

test-wheel: install ## build both distributions, check and install them, and run the fast tests against the wheel
	PYTHON=$(PYTHON) BUILD=$(abspath $(BIN))/python DIST=$(abspath $(DIST)) bash .ci/test-wheel

test-versions: ## the fast tests with the oldest and the newest torch, or PAIRS="TORCH/PYTHON ...", some 3 GB each
	bash .ci/test-versions

mutants: install ## plant a sample of faults, and see whether the tests notice: hours
	$(BIN)/pip install --quiet 'cosmic-ray>=8.4'
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutation.py --sample 200

docs: install ## build the documentation in docs/_build; warnings are errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build

lint: install ## ruff, rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install ## strict mypy
	$(BIN)/mypy

check: lint types test ## what to run before a commit

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist demo docs/_build docs/reports .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
