PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow test-real notebooks lint clean

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
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not real" tests

test-slow: .venv/.tested
	$(BIN)/python -m pytest -q -m "slow and not real" tests

test-real: .venv/.tested
	RETMASK_MODELS=$${RETMASK_MODELS:-models} $(BIN)/python -m pytest -q -m real tests

notebooks: .venv/.tested
	$(BIN)/python tests/make_notebooks.py

lint: .venv/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

clean:
	rm -rf .venv build dist *.egg-info
