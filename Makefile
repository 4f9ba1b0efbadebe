# Setup, demo, tests: each target starts from a bare clone.
# Needs Python 3.11 or 3.12 (make PYTHON=/path/to/python setup names one) and 6 GB of disk.

ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
endif

PY := .venv/bin/python
ARGS ?=
# One thread per process: the tests run in two. PYTORCH_JIT=0: Detectron2 compiles TorchScript for minutes otherwise.
TEST_ENV := OMP_NUM_THREADS=1 PYTORCH_JIT=0 TRITON_INTERPRET=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults lint format lock doctor clean

help: ## what each target does
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: ## make .venv from requirements.lock; does nothing when it is up to date
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found (tried python3.11, python3.12, python3, python)." \
		"Install one, or name it: make PYTHON=/path/to/python3.11 setup" >&2; exit 2; }
	@$(PYTHON) tools/setup_env.py

demo: setup ## compare small backbones on generated data, one seed: runs/demo/report.html (ARGS= adds options)
	$(PY) tools/run_suite.py --backbones vit,karat,gated_karat,kat,karkat,uniform --size nano --data sample --out runs/demo $(ARGS)

test: setup ## every test, on the CPU (ARGS="-k name" chooses)
	$(TEST_ENV) $(PY) -m pytest -n 2 $(ARGS)

test-faults: setup ## every fault and hostile input, in all three tasks (ARGS="-k hostile" chooses)
	$(TEST_ENV) $(PY) -m pytest tests/faults -m "faults or not faults" $(ARGS)

lint: setup ## ruff: style and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup ## ruff: rewrite the files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

lock: setup ## make requirements.lock again from pyproject.toml (ARGS=--upgrade takes newer versions)
	@$(PYTHON) tools/setup_env.py --lock $(ARGS)

doctor: setup ## check this machine and say what to run for each problem
	$(PY) tools/doctor.py

clean: ## remove .venv, runs/ and caches
	rm -rf .venv runs build .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
