VENV ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
CONSTRAINTS ?= constraints-cpu.txt
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart demo test test-all check clean

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PIP_ARGS=...     options for pip, for example --extra-index-url https://download.pytorch.org/whl/cpu"
	@echo "  VENV=...         where the environment is built (default .venv)"
	@echo "  CONSTRAINTS=...  constraints file (default constraints-cpu.txt; /dev/null on a GPU machine)"

$(INSTALLED): setup.cfg pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PIP_ARGS) --editable .[dev]
	touch $@

install: $(INSTALLED)  ## Build the environment in .venv

quickstart: $(INSTALLED)  ## All stages on the Python documentation of this machine, about a quarter of an hour
	$(BIN)/disranker quickstart $(ARGS)

demo: $(INSTALLED)  ## A search page on what the quickstart made
	test -e runs/quickstart/report/results.json || $(BIN)/disranker quickstart
	$(BIN)/disranker demo --corpus runs/quickstart/data/corpus.parquet --student runs/quickstart/student \
		--teacher runs/quickstart/teacher --queries recipes/configs/quickstart/queries.txt $(ARGS)

test: $(INSTALLED)  ## The default tests
	$(BIN)/python -m pytest $(ARGS)

test-all: $(INSTALLED)  ## All tests, the slow ones too
	$(BIN)/python -m pytest -m '' $(ARGS)

check: $(INSTALLED)  ## Lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## Remove the environment, caches and runs
	rm -rf $(VENV) runs build dist .mypy_cache .ruff_cache .pytest_cache
