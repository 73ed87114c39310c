# make demo: set up and run the main job.   make test: set up and run the tests.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
BENCH_RESULTS ?= bespoke-data/benchmarks

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all lint format ui bench clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; it is needed, or give another: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## Distil solvers for the embedded model: pairs, sweep, MLflow, report (minutes)
	$(BIN)/bespoke sweep sweeps/configs/digits.yaml
	@echo "look at it:   open bespoke-data/experiments/digits/report.html   or   make ui"

test: $(VENV)/.installed  ## Run the default tests, in two processes
	$(BIN)/python -m pytest -n 2 -m "not slow and not cluster"

test-slow: $(VENV)/.installed  ## Run the slow and the cluster tests
	$(BIN)/python -m pytest -m "slow or cluster" --durations=20

test-all: test test-slow  ## Run every test

lint: $(VENV)/.installed  ## Style, types, and the direction of dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: $(VENV)/.installed  ## Open MLflow on the demo's results
	$(BIN)/bespoke ui

bench: $(VENV)/.installed  ## Run the benchmarks, the long ones in quick mode; they print ratios (minutes)
	$(BIN)/python benchmarks/bench_distillation.py --pairs 128 --validation-pairs 128 --lm-iterations 8 --adam-iterations 200 --name distillation-quick
	for name in sampling_overhead pairs sharing memory; do $(BIN)/python benchmarks/bench_$$name.py --quick --results $(BENCH_RESULTS) || exit 1; done

clean:  ## Remove the environment and the demo's results
	rm -rf $(VENV) bespoke-data
