# `make demo` and `make test` create the environment .venv themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-all lint types docs bench clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

demo: .venv/demo.stamp  ## Render, pre-train and fine-tune, end to end, in a few minutes
	$(BIN)/python tools/demo.py

PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: .venv/test.stamp lint types  ## Style, import rules, types and the fast tests
	$(PYTEST) -m "not slow"

test-all: test docs  ## Also the slow tests (wheel, Dask, torchrun, memory bombs, ...) and the site
	$(PYTEST) -m slow

lint: .venv/test.stamp  ## Style and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/test.stamp  ## Static types
	$(BIN)/mypy

docs: .venv/test.stamp  ## The documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@! grep -rlE --include='*.html' '<(script|img|iframe)[^>]* src="?([a-z]+:)?//' site  # pages load nothing from elsewhere
	@echo "site/index.html; with search: $(BIN)/mkdocs serve"

bench: .venv/bench.stamp  ## Speed of generator, shards and streams, beside other loaders
	$(BIN)/python tools/bench_generator.py
	$(BIN)/python tools/bench_shards.py
	$(BIN)/python tools/bench_stream.py

clean:  ## Remove the environment and caches; datasets and runs stay
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "error: $(PYTHON) is not Python 3.11 to 3.13; run 'make PYTHON=python3.12 ...'" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/demo.stamp: pyproject.toml | .venv/bin/python
	@echo "installing into .venv, PyTorch included (about 6 GB, a few minutes)"
	$(BIN)/python -m pip install --quiet -e '.[train]'
	touch $@

.venv/test.stamp: pyproject.toml | .venv/bin/python
	@echo "installing into .venv, PyTorch included (about 6 GB, a few minutes)"
	$(BIN)/python -m pip install --quiet -e '.[train,dask,s3,hub,report,imagenet,docs,dev]'
	touch $@ .venv/demo.stamp

.venv/bench.stamp: .venv/test.stamp
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	touch $@
