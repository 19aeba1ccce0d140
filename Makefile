# From a fresh clone, with Python, a C++ compiler and a package index: `make demo` or `make test`.
#
#   PYTHON  the interpreter that the virtual environment is made of
#   TORCH   the torch to install, as pip takes it: make test TORCH='torch==2.13.0'
#   VENV    where the virtual environment goes
#   WORKERS how many processes test at once, of a core and a gigabyte each
#   ARGS    more options for the program that runs: make test ARGS='-k restore'

PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
STAMPS := $(VENV)/stamps
CHOICE := $(STAMPS)/torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
IN_PARALLEL := --numprocesses=$(WORKERS) --dist=worksteal
CONSTRAINT := $(STAMPS)/constraint.txt
INSTALLED := $(STAMPS)/installed
BUILT := $(STAMPS)/built
SOURCES := setup.py $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests benchmarks -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.DELETE_ON_ERROR:
.PHONY: help demo test build lint bench bench-cpp bench-gpu kernel-budget test-cuda-build test-gpu gpu distribution torch clean

help: ## Show this help
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18
	@echo; sed -n '2,8s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

demo: $(STAMPS)/demo $(BUILT) ## Fine-tune a real model on real data, offline, in minutes
	$(BIN)/zoext finetune $(ARGS)

test: $(STAMPS)/test $(BUILT) ## Run all tests
	$(BIN)/python -m pytest $(IN_PARALLEL) $(ARGS)

build: $(BUILT) ## Build the operators in place, again where sources changed

lint: $(STAMPS)/dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

bench: $(STAMPS)/demo $(BUILT) ## Measure this machine: nothing else should run on it
	$(BIN)/zoext bench $(ARGS)

bench-cpp: ## Measure the C++ loops alone: needs Google Benchmark, but neither Python nor torch
	@$(MAKE) --no-print-directory -C benchmarks/csrc
	build/bench-cpp/bench-cpp $(ARGS)

test-cuda-build: ## Build for CUDA, without a GPU: needs nvcc and a CUDA build of torch
	@ZOEXT_CUDA=1 $(MAKE) --no-print-directory VENV=$(VENV)-cuda build
	$(VENV)-cuda/bin/python tools/check_cuda_kernels.py

kernel-budget: test-cuda-build ## Count the CUDA kernels' instructions, without a GPU: needs nvcc
	@$(MAKE) --no-print-directory VENV=$(VENV)-cuda $(VENV)-cuda/stamps/machine-code
	$(VENV)-cuda/bin/python benchmarks/kernel_budget.py $(ARGS)

test-gpu: gpu ## Run the CUDA tests on this machine's GPU: needs nvcc
	@$(MAKE) --no-print-directory VENV=$(VENV)-cuda $(VENV)-cuda/stamps/test $(VENV)-cuda/stamps/machine-code
	$(VENV)-cuda/bin/python -m pytest tests -m cuda $(ARGS)

bench-gpu: gpu ## Measure this machine's GPU: needs nvcc, and nothing else should run there
	@$(MAKE) --no-print-directory VENV=$(VENV)-cuda $(VENV)-cuda/stamps/demo
	$(VENV)-cuda/bin/python benchmarks/gpu.py $(ARGS)

# The CUDA build, after a look whether there is a GPU that it could run on, and before that, since torch
# is large, whether there is a device at all.
gpu:
	@ls /dev/nvidia[0-9]* /dev/dxg > /dev/null 2>&1 || command -v nvidia-smi > /dev/null || \
		{ echo "no GPU to run on: there is no /dev/nvidia0 and no nvidia-smi" >&2; exit 1; }
	@$(MAKE) --no-print-directory VENV=$(VENV)-cuda torch
	@$(VENV)-cuda/bin/python tools/check_gpu.py
	@$(MAKE) --no-print-directory test-cuda-build

distribution: $(INSTALLED) ## Make dist/: the sdist, a wheel from it; check what they hold
	rm -rf dist zoext.egg-info
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > /dev/null
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist dist/zoext-*.tar.gz
	$(BIN)/python tools/check_distribution.py dist

clean: ## Remove all that is made here, the virtual environments too
	rm -rf $(VENV) $(VENV)-cuda build dist *.egg-info zoext/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS):
	$(PYTHON) -m venv $(VENV)
	mkdir -p $@

# The torch that was chosen stays: everything else is installed under its constraint. Its version is
# the package's, since torch.__version__ may have a local part that the package has not.
torch: $(CHOICE)

$(CHOICE): | $(STAMPS)
	$(PIP) install '$(TORCH)' numpy
	rm -f $(STAMPS)/*
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(CONSTRAINT)
	@cat $(CONSTRAINT)
	touch $@

# Without build isolation, which would fetch another torch to build with.
$(INSTALLED): pyproject.toml $(CHOICE)
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" > $(STAMPS)/build-requirements.txt
	$(PIP) install --constraint $(CONSTRAINT) --requirement $(STAMPS)/build-requirements.txt
	$(PIP) install --constraint $(CONSTRAINT) --no-build-isolation --editable .
	touch $@ $(BUILT)

# The installation builds as well: what it has built is not built again.
$(BUILT): $(SOURCES) | $(INSTALLED)
	if find $(SOURCES) -newer $@ | grep -q .; then $(BIN)/python setup.py -q build_ext --inplace; fi
	touch $@

$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/dev $(STAMPS)/machine-code: $(STAMPS)/%: $(INSTALLED)
	$(PIP) install --constraint $(CONSTRAINT) 'zoext[$*]'
	touch $@
