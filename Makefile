# make quickstart   convert, uptrain and evaluate the small example checkpoint
# make test         the fast tests
# make test-slow    the slow ones
# make check        format, lint and types
# make docs         the pages as a site, in site/

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-slow check docs clean

quickstart: .venv/installed
	$(BIN)/uptrain run quickstart

test: .venv/installed
	$(BIN)/pytest -n auto

test-slow: .venv/installed
	$(BIN)/pytest -m slow

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -q -c constraints.txt -e '.[docs]'
	touch $@

# Installed once; again only when the requirements change.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv uptrain-quickstart site
