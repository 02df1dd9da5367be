# Each target makes its own .venv on a machine that has only Python 3.11+ and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
ARGS ?=

.PHONY: demo test test-gpu check static format bench clean

demo: .venv/demo.installed
	$(BIN)/fqcompile demo $(ARGS)

test: .venv/dev.installed
	$(BIN)/pytest -n $(WORKERS) $(ARGS)

test-gpu: .venv/dev.installed
	$(BIN)/pytest -m gpu $(ARGS)

check: .venv/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_house.py

static: .venv/dev.installed
	$(BIN)/python -m bench static --check $(ARGS)

format: .venv/dev.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/bench.installed
	$(BIN)/python -m bench $(ARGS)

.venv/%.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
