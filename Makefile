# The short commands: `make` lists them. The first one that needs it makes .venv and installs the pinned versions; later ones reuse it.
#
#   make train                                                  the laptop recipe, from installation to an exported model
#   make train RECIPE=recipes/v3-16b.toml ARGS="--dry-run"      another recipe, and options of `quintet train`
#   make test ARGS="tests/spec -k curve"                        some of the tests

PYTHON ?= python3
RECIPE ?= recipes/laptop.toml
ARGS ?=
NAME ?= $(basename $(notdir $(RECIPE)))-$(shell date +%Y%m%d-%H%M%S)
JOBS ?= auto

bin := .venv/bin
installed := .venv/installed
# Fixed once, so that training and export speak of the same run.
name := $(NAME)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install train test check lint types floors bench clean

help: ## what can be made
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  settings: PYTHON=$(PYTHON) RECIPE=$(RECIPE) NAME=<run> ARGS=<options> JOBS=$(JOBS)"

$(installed): pyproject.toml constraints.txt
	@python=$(PYTHON); if test -x $(bin)/python; then python=$(bin)/python; fi; \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Quintet needs Python 3.11 or newer, and $$python is: $$($$python --version 2>&1);" \
	       "name a newer one: make clean && make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(bin)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { \
	  echo "$(PYTHON) cannot make .venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "installing Quintet and its pinned dependencies into .venv ..."
	@$(bin)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(installed) ## .venv with every pinned version

train: $(installed) ## train RECIPE from raw text, then export the model
	$(bin)/quintet train $(RECIPE) --name $(name) $(ARGS)
	@if test -d runs/$(name); then set -x; $(bin)/quintet export runs/$(name) runs/$(name)/hf; fi

test: $(installed) ## all tests, JOBS at a time
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -n $(JOBS) $(ARGS)

check: lint types floors ## ruff, mypy, and that imports only go down

lint: $(installed)
	$(bin)/ruff check .

types: $(installed)
	$(bin)/mypy

floors: $(installed)
	$(bin)/python -m pytest -n 0 tests/test_floors.py

bench: $(installed) ## every script of benchmarks/
	@set -e; for script in benchmarks/*.py; do echo "$$script"; $(bin)/python $$script $(ARGS); done

clean: ## remove .venv and caches; runs/ and prepared/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find quintet tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
