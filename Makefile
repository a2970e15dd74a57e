# make          set up .venv, run the whole DAG as a Prefect flow, print the table and the report's path
# make test     set up .venv, run every test
# make ui       serve the Prefect UI with this project's runs (PORT=4200)
# make nightly  serve the nightly deployment by the cron of params.yaml; needs `make ui` running
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 4200
JOBS ?= $(shell expr $$(nproc) + 1)# test processes; a file's tests share one, and some of them wait
PYTEST = .venv/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: all install install-dev test test-fast lint ui nightly clean
all: install
	.venv/bin/edgepress run

install: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "edgepress needs Python 3.11: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

install-dev: .venv/installed-dev
.venv/installed-dev: .venv/installed
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/transformers4: tests/support/transformers4.txt .venv/installed-dev
	.venv/bin/python -m pip install --quiet --upgrade --no-deps --target $@ --requirement $<
	touch $@

test: install-dev .venv/transformers4 lint
	$(PYTEST)

test-fast: install-dev
	$(PYTEST) -m 'not slow'

lint: install-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

ui: install
	.venv/bin/edgepress ui $(PORT)

nightly: install
	.venv/bin/edgepress night

clean: # what DVC has cached stays
	rm -rf .venv .prefect logs
