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

lint: .venv/lint-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/mypy

# The variable silences the theme's notice on its successor.
docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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
