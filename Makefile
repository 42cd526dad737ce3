# All targets need `setup`, which installs the locked packages and this project in .venv.
PYTHON ?= python3
BIN := .venv/bin
# These tests run one at a time, because they kill nodes or use the whole machine.
FAULTS := $(addprefix tests/pipeline/, test_faults.py test_machines.py test_readme_cluster.py)

.PHONY: setup demo test faults lint check clean

setup: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is required, but this is " + sys.version.split()[0] + ". Run: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# Run all stages on the handwritten digits. Prints a table, and writes pictures and runs/quickstart/report.html.
demo: setup
	$(BIN)/python -m jobs.quickstart --out runs/quickstart

test: setup
	$(BIN)/python -m pytest $(FAULTS:%=--ignore=%)

# Kill drivers, actors, nodes and machines, and fill a disk. This takes another twenty minutes.
faults: setup
	$(BIN)/python -m pytest --numprocesses=0 $(FAULTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test faults

clean:
	rm -rf .venv runs mlflow.db mlartifacts
