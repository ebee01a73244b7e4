# `make demo` and `make test` set up what they need in .venv, show what they do, and run.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

# torch's CPU build; from PyTorch's own index where the package sources set up here don't have it.
TORCH := torch==2.13.0
TORCH_NPU := torch-npu==2.13.0
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help setup demo test check bench clean

help: ## Show this help
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.demo ## Run an inference loop on a simulated NPU and show its trace
	$(BIN)/otel-npu demo

setup: $(VENV)/.test ## Set up all that the tests need, in .venv

test: $(VENV)/.test ## Run all tests
	$(BIN)/python -m pytest

check: $(VENV)/.test ## Run lint, format and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test ## Measure what a stage costs
	$(BIN)/python -W ignore -m benchmarks.stage_cost

clean: ## Remove what the other targets have made
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.10 or newer is needed: set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10: set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	@echo "Installing otel-npu into $(VENV) ..."
	$(BIN)/pip install --quiet --editable .
	@touch $@

# Without gcc or torch_npu (which has wheels for Linux only) their tests skip, and say so.
$(VENV)/.test: $(VENV)/.demo
	@echo "Installing the tests' tools, torch, torch_npu and a collector: some minutes the first time ..."
	@command -v gcc >/dev/null || echo "No gcc here: the tests on the real torch_npu binding will be skipped."
	$(BIN)/pip install --quiet --group dev
	$(BIN)/pip install --quiet $(TORCH)+cpu 2>/dev/null || \
		$(BIN)/pip install --quiet $(TORCH) --extra-index-url $(TORCH_INDEX)
	$(BIN)/pip install --quiet --group bench || echo "No collector for this platform: its tests will be skipped."
	$(BIN)/pip install --quiet --no-deps $(TORCH_NPU) || echo "No torch_npu for this platform: its tests will be skipped."
	@touch $@
