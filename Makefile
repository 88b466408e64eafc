PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-lowest lint docs

demo: .venv/recipes-installed
	$(BIN)/python -m recipes.digits

test: .venv/dev-installed
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term --cov-fail-under=95

# With the lowest versions that pyproject.toml allows.
test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pytest -n 2

lint: .venv/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs-installed
	$(BIN)/mkdocs build --strict

# .venv/recipes-installed, .venv/dev-installed, ...: the extra of that name is installed and up to date.
.venv/%-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[$*]"
	touch $@

.venv-lowest/installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --disable-pip-version-check -q uv
	.venv-lowest/bin/uv pip install -q --python .venv-lowest/bin/python --resolution lowest-direct -e ".[dev]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv
