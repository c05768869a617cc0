# Two commands are all a newcomer needs: `make demo` and `make test`. Each sets up VENV by itself.
#
#   make demo [IMAGE=path] [QUESTION="..."]   ask the demo model about a picture
#   make test [ARGS="-k scheduler"]           the whole gate: lint, types, layers, tests
#   make lint | types | layers | pytest       one part of it
#   make format                               rewrite the code as the gate wants it
#   make docs                                 regenerate docs/cli.md and docs/models.md
#   make test-clients                         other clients of the server, each in an environment of its own (slow)
#   make bench-cpu                            opsin against transformers.generate on this machine's CPU

VENV ?= .venv
PYTHON ?= python3
IMAGE ?= src/opsin/demo/pictures/animals.png
QUESTION ?= What is in the picture?
ARGS ?=

BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint types layers pytest test-clients format docs bench-cpu clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# Stamps: an environment is made once, and again when what defines it changes. The one with the tools serves the demo too.
$(VENV)/.opsin: pyproject.toml scripts/bootstrap.sh
	@PYTHON=$(PYTHON) scripts/bootstrap.sh $(VENV)
	@touch $@

$(VENV)/.opsin-dev: pyproject.toml scripts/bootstrap.sh
	@PYTHON=$(PYTHON) scripts/bootstrap.sh $(VENV) dev
	@touch $@ $(VENV)/.opsin

demo: $(VENV)/.opsin
	@echo "$(IMAGE): $(QUESTION)"
	@$(BIN)/opsin run "$(IMAGE)" "$(QUESTION)"

test: lint types layers pytest

lint: $(VENV)/.opsin-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.opsin-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

layers: $(VENV)/.opsin-dev
	$(BIN)/lint-imports

pytest: $(VENV)/.opsin-dev
	$(BIN)/python -m pytest $(ARGS)

test-clients: $(VENV)/.opsin-dev
	$(BIN)/python tests/clients/run.py

format: $(VENV)/.opsin-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.opsin-dev
	$(BIN)/python scripts/cli_reference.py > docs/cli.md
	$(BIN)/python -m scripts.models_reference > docs/models.md

bench-cpu: $(VENV)/.opsin
	$(BIN)/python benchmarks/cpu_vs_transformers.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
