# Two commands matter: `make demo` and `make test`. `make help` lists the others.
#
#   PYTHON    the Python 3.11 that the environments are built with
#   PIP_ARGS  further arguments of every `pip install`. Where plain `torch` is the CUDA build and there is no GPU, name
#             PyTorch's CPU index here (pytorch.org/get-started/locally shows it).
#   GPU_LOCK  gpu-cuda or gpu-cpu; by default gpu-cuda exactly where nvidia-smi is found
#   PYTEST_ARGS  further arguments of both test runs, e.g. PYTEST_ARGS="-k router -x"
#   TEST_WORKERS  processes of the pipeline's tests; 0 runs them in one

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3.11
PIP_ARGS ?=
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
GPU_LOCK ?= $(if $(shell command -v nvidia-smi),gpu-cuda,gpu-cpu)
DEMO_CONFIG ?= sampleworld/demo.yaml

export BIMODE_HOME := $(CURDIR)
export BIMODE_GPU_PYTHON := $(CURDIR)/.venv-gpu/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
# On a CPU that other work shares, threads that wait by spinning take the time that the working one needs.
export OMP_WAIT_POLICY ?= PASSIVE

# A stamp carries the digest of what its environment was built from: a changed lock rebuilds it, a touched one does not.
digest = $(shell cat $(1) | sha256sum | cut -c 1-16)
PIPELINE_LOCKS := requirements/pipeline.txt requirements/cluster.txt requirements/dev.txt requirements/pipeline-dev.txt
GPU_LOCKS := requirements/$(GPU_LOCK).txt requirements/dev.txt
PIPELINE_STAMP := .venv/.built-$(call digest,$(PIPELINE_LOCKS))
GPU_STAMP := .venv-gpu/.built-$(call digest,$(GPU_LOCKS))
PIPELINE_PROJECT_STAMP := .venv/.project-$(call digest,pyproject.toml $(PIPELINE_LOCKS))
GPU_PROJECT_STAMP := .venv-gpu/.project-$(call digest,pyproject.toml $(GPU_LOCKS))

# gpu-cuda.txt leaves the CUDA libraries to torch, which pins them; every other lock is complete.
NO_DEPS = $(if $(findstring gpu-cuda,$(1)),,--no-deps)

# What needs torch runs in the GPU-side environment, everything else in the light one: the folder decides.
GPU_TEST_FOLDERS := tests/training tests/sampleworld/gpu
GPU_TESTS := $(wildcard $(GPU_TEST_FOLDERS))

LINT := .venv/bin/ruff check --output-format concise . && .venv/bin/ruff format --check .
TYPES := .venv/bin/mypy

# A program of Prefect that speaks to the local server; the address is known once `bimode up` has run.
LOCAL_PREFECT = PREFECT_HOME=$(CURDIR)/.local/prefect PREFECT_API_URL=$$(cat .local/api_url) .venv/bin/prefect --no-prompt

.PHONY: help demo test lint types audit env env-gpu teacher base reproduce reproduce-smoke down clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: env env-gpu ## Start everything, curate the sample data, show the result
	@echo "[demo] 1/3 the local stack"
	@.venv/bin/bimode up --config $(DEMO_CONFIG)
	@echo "[demo] 2/3 curation; details: .local/logs/worker.log"
	@tail --lines=0 --follow=name --retry --pid=$$$$ .local/logs/worker.log 2>/dev/null \
	  | grep --line-buffered "| Flow run '" & \
	$(LOCAL_PREFECT) deployment run curate/bimode --watch --param config=$(DEMO_CONFIG) || { \
	  echo "[demo] the curation failed; the end of .local/logs/worker.log:"; tail -n 25 .local/logs/worker.log; exit 1; }
	@echo "[demo] 3/3 the result"
	@.venv/bin/bimode summary --config $(DEMO_CONFIG)

# Both runs are always executed; the last lines are theirs, and the exit status is 1 when anything failed.
test: env env-gpu ## Check style and types and run all tests in both environments
	@mkdir -p .local/logs; failed=; \
	echo "[test] lint"; { $(LINT); } || failed="$$failed lint"; \
	echo "[test] types"; $(TYPES) || failed="$$failed types"; \
	echo "[test] pipeline (.venv)"; \
	.venv/bin/python -m pytest $(GPU_TEST_FOLDERS:%=--ignore=%) -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS) | tee .local/logs/test-pipeline.log \
	  || failed="$$failed pipeline"; \
	if [ -n "$(GPU_TESTS)" ]; then \
	  echo "[test] GPU side (.venv-gpu)"; \
	  .venv-gpu/bin/python -m pytest $(GPU_TESTS) $(PYTEST_ARGS) | tee .local/logs/test-gpu.log \
	    || failed="$$failed gpu-side"; \
	  echo "[test] pipeline:"; tail -n 1 .local/logs/test-pipeline.log; \
	  echo "[test] GPU side:"; tail -n 1 .local/logs/test-gpu.log; \
	fi; \
	if [ -n "$$failed" ]; then echo "[test] FAILED:$$failed"; exit 1; fi

lint: env ## Check style and formatting
	@$(LINT)

types: env ## Check types
	@$(TYPES)

audit: env ## Look every pinned package up in the advisory database
	@.venv/bin/python deploy/audit.py

env: $(PIPELINE_PROJECT_STAMP) ## Build the light environment (.venv) of the pipeline

env-gpu: $(GPU_PROJECT_STAMP) ## Build the GPU-side environment (.venv-gpu): vLLM, torch, transformers, TRL

$(PIPELINE_STAMP):
	@echo "[env] building .venv from $(PIPELINE_LOCKS)"
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --no-deps $(PIP_ARGS) $(PIPELINE_LOCKS:%=-r %)
	@touch $@

$(GPU_STAMP):
	@echo "[env-gpu] building .venv-gpu from $(GPU_LOCKS): several GB, some minutes"
	$(PYTHON) -m venv --clear .venv-gpu
	.venv-gpu/bin/python -m pip install $(call NO_DEPS,$(GPU_LOCK)) $(PIP_ARGS) -r requirements/$(GPU_LOCK).txt
	.venv-gpu/bin/python -m pip install --no-deps $(PIP_ARGS) -r requirements/dev.txt
	@.venv-gpu/bin/python -c "import torch" || { echo "[env-gpu] torch cannot be imported. Without a GPU it must be the" \
	  "CPU build: run 'make env-gpu PIP_ARGS=\"--extra-index-url ADDRESS\"' with the address of PyTorch's CPU index" \
	  "(pytorch.org/get-started/locally, choose Pip and CPU)."; exit 1; }
	@touch $@

$(PIPELINE_PROJECT_STAMP): $(PIPELINE_STAMP)
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(GPU_PROJECT_STAMP): $(GPU_STAMP)
	.venv-gpu/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

teacher: env-gpu ## Train the bundled teacher anew (under 60 minutes on two cores)
	.venv-gpu/bin/python -m sampleworld.make_models teacher

base: env-gpu ## Train the bundled base model anew (under 30 minutes on two cores)
	.venv-gpu/bin/python -m sampleworld.make_models base

reproduce: env-gpu ## Run the paper's findings small: three seeds, each up to two hours on two cores (SEEDS="0 1")
	PYTHONPATH=teacher/cpu_site .venv-gpu/bin/python -m sampleworld.reproduce $(if $(SEEDS),--seeds $(SEEDS))

reproduce-smoke: env-gpu ## Show the machinery of `make reproduce` in minutes; its figures mean nothing
	PYTHONPATH=teacher/cpu_site .venv-gpu/bin/python -m sampleworld.reproduce --smoke

down: ## Stop what `make demo` started; data stays
	@if [ -x .venv/bin/bimode ]; then .venv/bin/bimode down; else echo "nothing runs: there is no .venv"; fi

clean: down ## Remove environments, caches and the local Prefect database; runs/ stays
	rm -rf .venv .venv-gpu .local build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
