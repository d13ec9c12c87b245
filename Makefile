# On a fresh machine with Python >= 3.11, `make demo` and `make test` are the only commands needed.
# Tests run on all cores, each file on one, so that what its tests share is built once; `make test PYTEST_ARGS=` runs
# them in one process.
# Every target sets up .venv by itself, once: the stamp files below make a second run free.

PYTHON ?= python3
PYTEST_ARGS ?= -n auto --dist loadfile --no-loadscope-reorder
BIN := .venv/bin
SETUP := requirements-dev.txt setup.cfg pyproject.toml

.PHONY: help demo install test test-all test-road test-wild check docs bench clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: .venv/.installed ## train a small network on digits, compile it, compare (a minute or two)
	$(BIN)/fxprune demo --output build/demo

install: .venv/.installed-dev ## create .venv with fxprune (editable) and everything the tests need

test: .venv/.installed-dev ## run the tests that a change must pass
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: .venv/.installed-dev ## run every test, slow ones too
	$(BIN)/python -m pytest -m "not huge and not wild" --hypothesis-profile=thorough $(PYTEST_ARGS)

test-road: .venv/.installed-dev ## build a wheel, install it, follow README and docs with it
	$(BIN)/python -m pytest -m road tests/road

test-wild: .venv-wild/.installed ## compile the networks of other libraries, which it installs into .venv-wild
	.venv-wild/bin/python -m pytest -m wild $(PYTEST_ARGS) tests/wild

check: .venv/.installed-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/.installed-dev ## build the documentation into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: .venv/.installed-dev ## measure compile times and memory (several minutes) into benchmarks/results
	$(BIN)/python -m benchmarks.compile_time --record
	$(BIN)/python -m benchmarks.compile_time --scaling --record

clean: ## remove .venv, caches and build products
	rm -rf .venv .venv-wild build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python .venv-wild/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fxprune needs Python >= 3.11; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(@D:/bin=)

.venv/.installed: $(SETUP) | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements-dev.txt -e '.[onnx]'
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements-dev.txt -e '.[dev]'
	touch $@

.venv-wild/.installed: $(SETUP) tests/wild/requirements.txt | .venv-wild/bin/python
	.venv-wild/bin/python -m pip install --quiet --disable-pip-version-check -c requirements-dev.txt -r tests/wild/requirements.txt -e '.[test,onnx]'
	touch $@
