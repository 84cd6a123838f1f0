# Commands of development. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help install test coverage lint format docs results

help: ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: ## create the environment and install the git hooks
	uv sync --all-groups
	@if command -v pre-commit >/dev/null; then pre-commit install; else echo "pre-commit is absent: no git hooks"; fi

test: ## run the tests, except those marked slow
	uv run --dev pytest

coverage: ## run the same tests and report the lines that none of them runs
	uv run --dev pytest --cov=mtlsign --cov-report=term:skip-covered

lint: ## check style, types and import layers
	uv run --dev ruff check .
	uv run --dev ruff format --check .
	uv run --dev mypy
	uv run --dev lint-imports

format: ## fix style
	uv run --dev ruff check --fix .
	uv run --dev ruff format .

results: ## write the pages and tables from docs/results
	uv run docs/generate_results.py

docs: results ## write the generated pages and build the site in site/
	uv run docs/generate_reference.py
	NO_MKDOCS_2_WARNING=1 uv run --group docs mkdocs build --strict
