# `make demo` and `make test` work on a bare machine with Python 3.11; both can be repeated.
# Variables: PYTHON (interpreter to build with), VENV, VISPEC_STACK=cpu|gpu, PYTEST_ARGS, DRAFT.
PYTHON ?= python3.11
VENV ?= .venv
PY := $(VENV)/bin/python
# Engines are single-threaded here: two files at a time, each file's engines shared by its tests.
WORKERS ?= 2
PYTEST := $(PY) -m pytest -q -n $(WORKERS) --dist loadfile
PYTEST_ARGS ?=
DRAFT ?= head
MAKEFLAGS += --no-print-directory
export VLLM_NO_USAGE_STATS ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu test-all lint format docs house bench report clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: ## create .venv and install everything (a no-op when nothing changed)
	@PYTHON="$(PYTHON)" VENV="$(abspath $(VENV))" bash tests/cpu_stack/setup_env.sh

demo: setup ## serve the tiny VLM with and without ViSpec on real images (DRAFT=head|draft_vlm|sibling)
	@$(PY) -m examples.demo --draft $(DRAFT)

test: setup lint ## lint and the default tests (about 8 minutes on 2 cores)
	@$(PYTEST) $(PYTEST_ARGS)

test-slow: setup ## the long matrix: vLLM 0.33, and everything marked slow
	@$(PYTEST) -m "slow or overlay" $(PYTEST_ARGS)

test-all: setup lint ## every test
	@$(PYTEST) -m "" $(PYTEST_ARGS)

test-gpu: setup ## what needs a GPU: starts, graphs, attention, vispec verify (under 15 minutes)
	@$(PY) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || \
		{ echo "make test-gpu: torch finds no CUDA device here" >&2; exit 1; }
	@$(PY) -m pytest -q tests/gpu $(PYTEST_ARGS)

lint: setup ## ruff, mypy, and the generated tables of the documentation
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet . || { echo "lint: run 'make format'" >&2; exit 1; }
	@$(PY) -m mypy --no-error-summary
	@$(PY) -m tools.docs --check
	@$(PY) -m tools.house

format: setup ## rewrite files as ruff wants them
	@$(PY) -m ruff check --fix --quiet . ; $(PY) -m ruff format --quiet .

docs: setup ## write the generated tables of the documentation
	@$(PY) -m tools.docs

house: setup ## size and shape of the repository against its limits
	@$(PY) -m tools.house

bench: setup ## compare the speed with plain vLLM and with vLLM's EAGLE
	@$(PY) -m benchmarks decode-speed
	@$(PY) -m benchmarks draft-cost

report: setup ## measure the shipped pair and write docs/report (about 35 minutes, 2 cores)
	@$(PY) -m benchmarks.pair_report

clean: ## remove caches and the virtual environment
	rm -rf "$(VENV)" build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
