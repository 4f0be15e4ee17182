# The doors of the repository. `make demo` and `make test` need only Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench bench-data bench-scaling faults soak

# One set-up for all: the stamp is renewed when the pins or the package's metadata change.
.venv/installed: constraints.txt pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'llavaforge needs Python 3.11 or later'"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/llavaforge quickstart

test: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest  # DeepSpeed compiles with .venv's ninja

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m bench.race

bench-data: .venv/installed
	$(BIN)/python -m bench.data

bench-scaling: .venv/installed
	$(BIN)/python -m bench.scaling

faults: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m bench.faults

soak: .venv/installed
	$(BIN)/python -m bench.soak
