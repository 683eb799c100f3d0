PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow notebooks lint clean

setup: .venv/.installed

.venv/.installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/.tested: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

demo: .venv/.installed
	$(BIN)/retmask run --config=tiny --workdir=runs/tiny

test: .venv/.tested lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" tests

test-slow: .venv/.tested
	$(BIN)/python -m pytest -q -m slow tests

notebooks: .venv/.tested
	$(BIN)/python tests/make_notebooks.py

lint: .venv/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

clean:
	rm -rf .venv build dist *.egg-info
