# Everything that is done to this project by hand or by a machine. 'make' lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
PROJECT ?= examples/retail
PYTEST_ARGS ?=
export UV_PYTHON_DOWNLOADS := never
export UV_NO_PROGRESS := 1
export PYTHONPATH :=

UV := .tools/bin/uv
PY := .venv/bin/python
CODE := src components pipelines tests docs benchmarks feature_repo
COMPILE := $(UV) pip compile -q --generate-hashes --no-annotate --no-header --python $(PY)
EXPORT := $(UV) export -q --frozen --no-emit-project --no-annotate --no-header

.PHONY: help env loop test test-quick test-cluster test-full images check format lock spec docs bench dvc peers clean announce

help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: .venv/.ready .venv-runtime/.ready ## Make both Python environments from the locks

loop: announce ## Run the whole loop on the built-in history: train, serve, drift, retrain, roll out
	@$(MAKE) -s --no-print-directory env
	@.venv/bin/perennial replay $(PROJECT)

test: env ## Run the tests that CI runs, with replays of real histories (20 minutes)
	@tests/run $(PYTEST_ARGS)

test-quick: env ## Run the tests that take seconds (3 minutes)
	@$(PY) -m pytest -q -m "not slow and not replay and not full and not cluster" $(PYTEST_ARGS)

test-cluster: env ## Run the tests on a cluster: that of KUBECONFIG, or ../shared/cluster (35 minutes)
	@tests/cluster/run $(PYTEST_ARGS)

images: ## Build the two container images (IMAGE_BUILDER, or the first of docker, podman, buildah)
	@images/build

test-full: env ## Run all tests, with whole histories of years and many kills, into BENCHMARKS.md (75 minutes)
	@$(PY) -m benchmarks full full-cluster

check: env ## Check format, lint, types, imports, and that generated files are current
	@$(PY) -m ruff format --check $(wildcard $(CODE))
	@$(PY) -m ruff check $(wildcard $(CODE))
	@$(PY) -m mypy
	@PYTHONPATH=. .venv/bin/lint-imports --no-logo
	@$(PY) -m pipelines.training --check
	@$(PY) docs/generate.py --check

format: env ## Format the code and mend what the linter can mend
	@$(PY) -m ruff check --fix-only $(wildcard $(CODE))
	@$(PY) -m ruff format $(wildcard $(CODE))

lock: .venv/.ready ## Resolve all environments anew into locks/ (with hashes, without hosts)
	@$(UV) lock -q --upgrade --python $(PY)
	@$(EXPORT) --extra core -o locks/core.txt
	@$(EXPORT) --extra core --no-default-groups -o locks/image.txt
	@$(EXPORT) --extra runtime --no-default-groups -o locks/runtime.txt
	@$(COMPILE) --upgrade locks/tools.in -o locks/tools.txt
	@$(COMPILE) --upgrade locks/peers.in -o locks/peers.txt
	@$(COMPILE) --upgrade locks/stores.in -o locks/stores.txt
	@$(COMPILE) --upgrade locks/dvc.in -o locks/dvc.txt
	@! grep -n '://' locks/*.txt

spec: env ## Compile pipelines/training.py into pipelines/training.yaml
	@$(PY) -m pipelines.training

docs: env ## Write the generated reference in docs/
	@$(PY) docs/generate.py

bench: env ## Measure time, memory and latency into BENCHMARKS.md (15 minutes)
	@$(PY) -m benchmarks

dvc: .venv-dvc/.ready ## Make a small environment of DVC, which its tests want

peers: .venv-peers/.ready ## Make the third environment, with neighbours to compare with

clean: ## Remove environments, caches and the state of all projects here
	@rm -rf .venv .venv-runtime .venv-dvc .venv-peers .tools build dist .perennial
	@rm -rf mlruns .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

announce:
	@if [ -e .venv/.ready ] && [ -e .venv-runtime/.ready ]; then exit 0; fi; \
	echo "First, once: two Python environments in .venv and .venv-runtime, 2.3 GB of disk,"; \
	echo "0.9 GB of it fetched in one to five minutes. Then the loop: about 5 minutes on 2 cores."

# Environments. A warm one costs nothing: each stamp is newer than what it was made from.

.tools/.ready: locks/tools.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "$(PYTHON) is not Python 3.11; give one by 'make PYTHON=/path/to/python3.11 ...'"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "Python cannot make environments; run 'apt-get install python3-venv'"; exit 2; }
	@[ -x .tools/bin/python ] || $(PYTHON) -m venv .tools
	@.tools/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r $<
	@touch $@

.venv/.locked: locks/core.txt
.venv-runtime/.locked: locks/runtime.txt
.venv-dvc/.ready: locks/dvc.txt
.venv-peers/.ready: locks/peers.txt
.venv/.locked .venv-runtime/.locked .venv-dvc/.ready .venv-peers/.ready: | .tools/.ready
	@echo "making $(@D) from $<"
	@[ -x $(@D)/bin/python ] || $(UV) venv -q --python .tools/bin/python $(@D)
	@$(UV) pip sync -q --python $(@D)/bin/python --require-hashes $<
	@touch $@

# One editable wheel for both environments, built by the hatchling of the lock: nothing unlocked is fetched.
build/.wheel: .venv/.locked pyproject.toml
	@rm -rf build && mkdir build
	@$(PY) -m hatchling build -t wheel:editable -d build >build/log 2>&1 || { cat build/log; exit 1; }
	@touch $@

.venv/.ready .venv-runtime/.ready: %/.ready: %/.locked build/.wheel
	@$(UV) pip install -q --python $(@D)/bin/python --no-deps --no-index --reinstall build/*.whl
	@touch $@
