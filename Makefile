# Two commands from a fresh clone: `make demo`, `make test`. Each creates what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

# The first interpreter that is new enough, whatever it is called.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: demo test test-slow lint format bench clean lock

demo: $(VENV)/base
	$(BIN)/tpu-stack demo

test: $(VENV)/dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=15 -m "not slow"

# Then the core of the quick suite at the compiler flags that users have; the suite's own are lower.
AT_USERS_FLAGS := tests/models/test_hf_parity.py tests/training/test_step.py \
	tests/serving/engine/test_engine.py tests/quant/test_matmul.py

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow
	XLA_FLAGS= $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(AT_USERS_FLAGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev
	$(BIN)/python experiments/bench_all.py $(if $(DATA),--data $(DATA))

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "make: error: Python 3.12 or newer is needed; found: $$(python3 --version 2>&1 || echo none)." \
	       "Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; fi
	$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 12) and sys.exit(f"make: error: {sys.executable} is Python {v[0]}.{v[1]}; 3.12 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/base: requirements.lock pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e .
	@touch $@

$(VENV)/dev: requirements.lock pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev,aot,serve]'
	@touch $@ $(VENV)/base

# Pins for Python 3.12 and newer on every platform; no index addresses.
lock: $(VENV)/dev
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra aot --extra serve --extra gguf --universal --python-version 3.12 \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links -o requirements.lock

clean:
	rm -rf $(VENV) build dist runs *.egg-info
