# `make demo` and `make test` set up what they need in .venv, show what they do, and run.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

# The CPU build of torch: from the package sources set up here or, if they have none, from PyTorch's own.
TORCH := torch==2.13.0
TORCH_NPU := torch-npu==2.13.0
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help setup demo test lint types check bench clean

help:  ## Show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12
