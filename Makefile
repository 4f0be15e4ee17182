# The doors of the repository. `make demo` and `make test` need only Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-lowest check bench bench-gpu bench-data bench-scaling bench-features bench-lengths bench-evaluate faults soak test-clients test-demo docs

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

# The lowest versions that pyproject.toml allows, in an environment of their own.
.venv-lowest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
		'torch==2.11.0' 'transformers==5.23.0' 'peft==0.21.0'
	touch $@

test-lowest: .venv-lowest/installed
	.venv-lowest/bin/pytest tests/model tests/engine/test_engines.py tests/inference/test_export.py

# Real programs on what llavaforge leaves, each in an environment of its own (downloads; minutes).
test-clients: .venv/installed
	$(BIN)/python -m tests.clients

# The documentation as a site, in site/.
docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict --quiet

# The page of `llavaforge demo` in a browser, and trackio. Gradio and trackio take no Pillow from 13 on, so they have an
# environment of their own, with an older Pillow above all else of .venv.
.venv-demo/installed: .venv/installed constraints.txt
	$(BIN)/python -m venv .venv-demo
	for version in $$(ls .venv-demo/lib); do \
		echo "import site; site.addsitedir('$(CURDIR)/.venv/lib/$$version/site-packages')" \
			>.venv-demo/lib/$$version/site-packages/base.pth; done
	grep -vi '^pillow==' constraints.txt >.venv-demo/constraints.txt
	.venv-demo/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-demo/constraints.txt \
		'gradio>=6.31,<7' playwright 'trackio>=0.43'
	touch $@

test-demo: .venv-demo/installed
	.venv-demo/bin/python -m pytest -n0 tests/inference/test_demo.py tests/training/test_trackio.py

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m bench.race

bench-gpu: .venv/installed
	$(BIN)/python -m bench.gpu

bench-data: .venv/installed
	$(BIN)/python -m bench.data

bench-scaling: .venv/installed
	$(BIN)/python -m bench.scaling

bench-features: .venv/installed
	$(BIN)/python -m bench.features

bench-lengths: .venv/installed
	$(BIN)/python -m bench.lengths

bench-evaluate: .venv/installed
	$(BIN)/python -m bench.evaluate

faults: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m bench.faults

soak: .venv/installed
	$(BIN)/python -m bench.soak
