# From a fresh clone, with Python, a C++ compiler and a package index: `make demo` or `make test`.
#
#   PYTHON  the interpreter that creates the virtual environment
#   TORCH   the torch to install, in pip's syntax: make test TORCH='torch==2.13.0'
#   VENV    the folder of the virtual environment; VENV=none uses PYTHON as it is and installs nothing
#   WORKERS number of test processes, each of which needs a core and a gigabyte
#   ARGS    further options for the program that runs: make test ARGS='-k restore'

PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

LINTERS := ruff ruff-format clang-format mypy typos
EXTRAS := finetune transformers lightning accelerate peft packed trl demo test machine-code docs dev
IN_PARALLEL = $(shell $(RUN) -c "import xdist" 2> /dev/null && echo --numprocesses=$(WORKERS) --dist=worksteal)
SOURCES := setup.py $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests benchmarks -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.DELETE_ON_ERROR:
.PHONY: help demo test build lint docs bench bench-cpp bench-gpu kernel-budget test-cuda-build test-gpu gpu distribution torch \
	installed built $(EXTRAS:%=extra-%) $(LINTERS:%=lint-%) clean

help: ## Show this help
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18
	@echo; sed -n '3,7s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

demo: extra-demo built ## Fine-tune a language model on human-rated sentences, in minutes
	$(RUN) -m zoext.cli finetune $(ARGS)

test: extra-test built ## Run all tests
	$(RUN) -m pytest $(IN_PARALLEL) $(ARGS)

build: built ## Build the operators in place, again after a change of their sources

lint: $(LINTERS:%=lint-%) ## Check style, types and spelling

lint-ruff: extra-dev
	$(call program,ruff) check .

lint-ruff-format: extra-dev
	$(call program,ruff) format --check .

lint-clang-format: extra-dev
	$(call program,clang-format) --dry-run -Werror $(CXX_FILES)

lint-mypy: extra-dev
	$(RUN) -m mypy

lint-typos: extra-dev
	$(call program,typos)

docs: extra-docs ## Build the pages into build/site
	NO_MKDOCS_2_WARNING=1 $(call program,mkdocs) build --strict --quiet $(ARGS)

bench: extra-demo built ## Measure this machine: nothing else should run on it
	$(RUN) -m zoext.cli bench $(ARGS)

bench-cpp: ## Measure the C++ loops alone: needs Google Benchmark, but neither Python nor torch
	@$(MAKE) --no-print-directory -C benchmarks/csrc
	build/bench-cpp/bench-cpp $(ARGS)

test-cuda-build: ## Build for CUDA, without a GPU: needs nvcc and a CUDA build of torch
	@ZOEXT_CUDA=1 $(MAKE) --no-print-directory VENV=$(CUDA_VENV) build
	$(RUN_CUDA) tools/check_cuda_kernels.py

kernel-budget: test-cuda-build ## Count the CUDA kernels' instructions, without a GPU: needs nvcc
	@$(MAKE) --no-print-directory VENV=$(CUDA_VENV) extra-machine-code
	$(RUN_CUDA) benchmarks/kernel_budget.py $(ARGS)

test-gpu: gpu ## Run the CUDA tests on this machine's GPU: needs nvcc
	@$(MAKE) --no-print-directory VENV=$(CUDA_VENV) extra-test extra-machine-code
	$(RUN_CUDA) -m pytest tests -m cuda $(ARGS)

bench-gpu: gpu ## Measure this machine's GPU: needs nvcc, and nothing else should run there
	@$(MAKE) --no-print-directory VENV=$(CUDA_VENV) extra-demo
	$(RUN_CUDA) benchmarks/gpu.py $(ARGS)

# Looks for a device before it installs torch, which is large, and asks torch before it builds.
gpu:
	@ls /dev/nvidia[0-9]* /dev/dxg 2> /dev/null | grep -q . || command -v nvidia-smi > /dev/null || \
		{ echo "no GPU to run on: there is no /dev/nvidia0 and no nvidia-smi" >&2; exit 1; }
	@$(MAKE) --no-print-directory VENV=$(CUDA_VENV) torch
	@$(RUN_CUDA) tools/check_gpu.py
	@$(MAKE) --no-print-directory test-cuda-build

distribution: installed ## Make dist/: the sdist and a wheel from it; check their contents
	rm -rf dist zoext.egg-info
	$(RUN) -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > /dev/null
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist dist/zoext-*.tar.gz
	$(RUN) tools/check_distribution.py dist

clean: ## Remove everything that is made here, the virtual environments too
	rm -rf $(filter-out none,$(VENV) $(CUDA_VENV)) build dist *.egg-info zoext/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

ifeq ($(VENV),none)

# A given environment: nothing is created or installed, and the checkout is imported as it lies. setup.py
# finds out by itself what must be built, and writes the metadata that importlib.metadata reads.
CUDA_VENV := none
RUN := $(PYTHON)
RUN_CUDA := $(PYTHON)
PIP := $(PYTHON) -m pip --quiet --disable-pip-version-check
program = $(1)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

torch $(EXTRAS:%=extra-%):
	@:

installed:
	$(PYTHON) tools/check_environment.py

built: installed
	$(PYTHON) setup.py -q egg_info build_ext --inplace

else

CUDA_VENV := $(VENV)-cuda
RUN := $(VENV)/bin/python
RUN_CUDA := $(CUDA_VENV)/bin/python
PIP := $(RUN) -m pip --quiet --disable-pip-version-check
program = $(VENV)/bin/$(1)
STAMPS := $(VENV)/stamps
CHOICE := $(STAMPS)/torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
CONSTRAINT := $(STAMPS)/constraint.txt
INSTALLED := $(STAMPS)/installed
BUILT := $(STAMPS)/built

torch: $(CHOICE)
installed: $(INSTALLED)
built: $(BUILT)
$(EXTRAS:%=extra-%): extra-%: $(STAMPS)/%

$(STAMPS):
	$(PYTHON) -m venv $(VENV)
	mkdir -p $@

# The chosen torch stays: everything else is installed under its constraint. The version is that of the
# package, since torch.__version__ may have a local part that the package has not.
$(CHOICE): | $(STAMPS)
	$(PIP) install '$(TORCH)' numpy
	rm -f $(STAMPS)/*
	$(RUN) -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(CONSTRAINT)
	@cat $(CONSTRAINT)
	touch $@

# Without build isolation, which would download another torch to build with.
$(INSTALLED): pyproject.toml $(CHOICE)
	$(RUN) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" > $(STAMPS)/build-requirements.txt
	$(PIP) install --constraint $(CONSTRAINT) --requirement $(STAMPS)/build-requirements.txt
	$(PIP) install --constraint $(CONSTRAINT) --no-build-isolation --editable .
	touch $@ $(BUILT)

# The installation builds too, so that nothing is built twice.
$(BUILT): $(SOURCES) | $(INSTALLED)
	if find $(SOURCES) -newer $@ | grep -q .; then $(RUN) setup.py -q build_ext --inplace; fi
	touch $@

$(EXTRAS:%=$(STAMPS)/%): $(STAMPS)/%: $(INSTALLED)
	$(PIP) install --constraint $(CONSTRAINT) 'zoext[$*]'
	touch $@

endif
