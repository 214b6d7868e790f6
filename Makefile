# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = src examples tests benchmarks setup.py

.PHONY: demo test style quality bench clean

# The environment with the versions of constraints.txt; made again when one of these files changes.
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# A labelled grid of samples from the bundled checkpoint with their grain maps: demo.png
demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py --output demo.png

test: $(VENV)/.installed
	$(BIN)/python -m pytest tests

style: $(VENV)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

# Speed claims, each against its reference in the same process
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .pytest_cache .ruff_cache
