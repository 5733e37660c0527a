# Commands for people and for CI. Each one sets up what it needs; a second call does not install anything again.
#   make train                 build the digits set and train SeMi on it
#   make test                  lint, type check, tests
#   make test JOBS=1           in one process instead of one a core
#   make bench                 the benchmarks, one JSON line each, and a table, in ten minutes
#   make gpu                   prove and measure a GPU, in eight minutes at most
#   make test TORCH=torch==X   at the first call: install that build of PyTorch instead of the newest
SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
JOBS ?= $(shell cores=$$(nproc); echo $$((cores < 4 ? cores : 4)))
# Test processes share the cores: a thread that waits must not spin.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

.PHONY: setup train test test-slow lint bench gpu clean
.DEFAULT_GOAL := train

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.sh
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" VENV="$(VENV)" bash setup.sh
	@touch $@

train: setup
	$(BIN)/accelerate launch --quiet --config_file accelerate.yaml semi_fast/train.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup lint
	$(PYTEST) -m "not slow" -n $(JOBS) --dist loadfile $(ARGS)

test-slow: setup
	$(PYTEST) -m slow $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks.every $(ARGS)

gpu: setup
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
