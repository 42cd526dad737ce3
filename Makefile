# Everything rests on `setup`: a virtual environment in .venv with the locked packages and this project.
PYTHON ?= python3
BIN := .venv/bin
# Serial: they kill nodes, or take the whole machine.
FAULTS := $(addprefix tests/pipeline/, test_faults.py test_machines.py test_readme_cluster.py)

.PHONY: setup demo test faults lint check clean

setup: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, found " + sys.version.split()[0] + ": make setup PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# The whole story on the handwritten digits: a table, pictures and runs/quickstart/report.html.
demo: setup
	$(BIN)/python -m jobs.quickstart --out runs/quickstart

test: setup
	$(BIN)/python -m pytest $(FAULTS:%=--ignore=%)

# Kills drivers, actors, nodes and machines, fills a disk: twenty minutes of its own.
faults: setup
	$(BIN)/python -m pytest --numprocesses=0 $(FAULTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test faults

clean:
	rm -rf .venv runs mlflow.db mlartifacts
