# `make help` lists what there is. Every target makes what it needs, in a virtual environment of its
# own (.venv); set VENV to use another, PYTHON to choose the interpreter it is made with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CONVERTER := $(VENV)/.converter

# A torch that is known to work. Set TORCH to use another: make TORCH=torch
TORCH ?= torch==2.13.0

NATIVE_SOURCES := $(shell find csrc cmake build_backend -type f -not -name '*.pyc') CMakeLists.txt setup.py \
  pyproject.toml

CPP_FILES = $$(find csrc benchmarks tests/simt examples/cpp \
  -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo converter test test-slow test-cpp test-sanitizers test-valgrind test-old-cpu \
  test-python-sanitized test-cuda test-clang test-aarch64 bench bench-quick bench-compile bench-cuda \
  build docs lint format clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

build: $(INSTALLED)  ## compile what has changed, in place

demo: $(INSTALLED)  ## train a small language model with three norms; convert it where that is set up
	$(BIN)/python examples/train_lm.py --compare --out runs/demo
	@if $(BIN)/python -W ignore -c "import coreai_torch.converter" 2> /dev/null; then \
	  $(BIN)/python examples/train_and_convert.py --checkpoint runs/demo/checkpoint.pt; \
	else \
	  echo "To convert the model to Core AI and run it there, too: make converter && make demo"; \
	fi

converter: $(CONVERTER)  ## install Apple's converter and runtime, for the demo and the tests

test: $(INSTALLED) test-cpp  ## the C++ tests and the Python tests, but the slow ones
	@$(MAKE) -s converter || echo "Without Apple's converter: the tests of conversion are skipped."
	$(BIN)/python -m pytest -q -n auto -m "not slow"

# Two at a time: some fill a third of a laptop's memory.
test-slow: $(INSTALLED)  ## the slow tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow

test-cpp: $(INSTALLED)  ## the framework-free library's own tests
	$(BIN)/cmake -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DCOREAI_TORCH_WERROR=ON > /dev/null
	$(BIN)/cmake --build build/cpp
	$(BIN)/ctest --test-dir build/cpp --output-on-failure

# No address space randomization: ThreadSanitizer's own memory map does not bear all of it.
test-sanitizers: $(INSTALLED)  ## the C++ tests under AddressSanitizer, UBSan and ThreadSanitizer
	for sanitizers in address,undefined thread; do \
	  folder=build/sanitize-$${sanitizers%%,*} && \
	  $(BIN)/cmake -S . -B $$folder -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DCOREAI_TORCH_WERROR=ON -DCOREAI_TORCH_SANITIZE=$$sanitizers $(CMAKE_ARGS) > /dev/null && \
	  $(BIN)/cmake --build $$folder && \
	  setarch -R $(BIN)/ctest --test-dir $$folder --output-on-failure || exit 1; \
	done

# Of a copy with a build of its own. Python and PyTorch are not built for it, so the tool's libraries
# are loaded before them, and what they leave at the end of the process is not looked at.
SANITIZED := build/sanitize-python
SANITIZED_TESTS ?= tests/test_properties.py tests/test_rms_norm_forward.py \
  tests/test_rms_norm_backward.py tests/test_rms_norm_errors.py tests/test_func.py
test-python-sanitized: $(INSTALLED)  ## Python tests and the fuzzer, under AddressSanitizer and UBSan; 20 minutes
	mkdir -p $(SANITIZED)
	cp -au CMakeLists.txt setup.py pyproject.toml README.md LICENSE cmake csrc coreai_torch \
	  build_backend tests $(SANITIZED)
	cd $(SANITIZED) && PATH="$(abspath $(BIN)):$$PATH" \
	  CMAKE_ARGS="-DCOREAI_TORCH_SANITIZE=address,undefined $(CMAKE_ARGS)" \
	  $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(SANITIZED) && \
	  export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=16384 \
	    UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	    LD_PRELOAD="$$(for l in asan ubsan stdc++; do c++ -print-file-name=lib$$l.so; done | xargs)" && \
	  $(abspath $(BIN))/python tests/fuzz_ops.py --calls 20000 --address-space 0 && \
	  $(abspath $(BIN))/python -m pytest -q -m "not slow" $(SANITIZED_TESTS)

# valgrind does not know AVX-512 and hides it, so the levels up to x86-64-v3 are run.
test-valgrind: test-cpp  ## the C++ tests under valgrind's memcheck
	for test in build/cpp/test_*; do \
	  valgrind -q --error-exitcode=1 --leak-check=full $$test || exit 1; \
	done

test-old-cpu: test-cpp  ## the C++ tests on emulated processors without AVX and without AVX-512
	cmake/old_cpu.sh build/cpp

test-cuda: $(INSTALLED)  ## the tests on a CUDA card, a few of them under compute-sanitizer
	$(BIN)/python -m pytest -q tests/test_cuda.py
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest -q tests/test_cuda.py \
	  -k "test_layouts or test_heads or (test_accuracy and bfloat16-float32)"
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest -q tests/test_cuda.py \
	  -k "test_the_same_bits"

test-clang:  ## the C++ tests, compiled with clang
	cmake -S . -B build/clang -G Ninja -DCMAKE_CXX_COMPILER=clang++ -DCOREAI_TORCH_WERROR=ON > /dev/null
	cmake --build build/clang
	ctest --test-dir build/clang --output-on-failure

test-aarch64:  ## the C++ tests on aarch64, cross-compiled and emulated
	cmake -S . -B build/aarch64 -G Ninja --toolchain cmake/aarch64-linux-gnu.cmake \
	  -DCOREAI_TORCH_WERROR=ON > /dev/null
	cmake --build build/aarch64
	ctest --test-dir build/aarch64 --output-on-failure

bench: $(INSTALLED)  ## measure against PyTorch; write benchmarks/results/ and README's table (15 min)
	$(BIN)/python -m benchmarks --json benchmarks/results/cpu.json
	$(BIN)/python -m benchmarks.instructions --json benchmarks/results/instructions.json
	$(BIN)/python -m benchmarks.report

bench-quick: $(INSTALLED)  ## a few cases, printed only
	$(BIN)/python -m benchmarks --quick

bench-compile: $(INSTALLED)  ## the kernels under torch.compile, and the compiler's own code instead
	$(BIN)/python -m benchmarks.compile_modes

bench-cuda: $(INSTALLED)  ## measure on a CUDA card; write benchmarks/results/cuda.{json,md} and README's sentence
	$(BIN)/python -m benchmarks --device cuda --json benchmarks/results/cuda.json
	$(BIN)/python -m benchmarks.report

docs: $(INSTALLED)  ## the documentation, in build/docs/html
	$(BIN)/python -c "import furo, myst_parser" 2> /dev/null || $(BIN)/pip install -q "coreai-torch-rmsnorm[docs]"
	$(BIN)/python -m sphinx -W --keep-going -q -d build/docs/doctrees docs build/docs/html

lint: $(INSTALLED)  ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(INSTALLED)  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:  ## remove what was built
	rm -rf build dist runs *.egg-info coreai_torch/*.so coreai_torch/_build_torch_version

# The package is installed in place: Python changes count at once, C++ changes rebuild what they touch.
$(INSTALLED): $(BIN)/python $(NATIVE_SOURCES)
	$(BIN)/python -c "import torch" 2> /dev/null || $(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q "setuptools>=77" wheel "cmake>=3.22" ninja "pybind11>=2.12"
	PATH="$(abspath $(BIN)):$$PATH" CMAKE_ARGS="-DCOREAI_TORCH_WERROR=ON $(CMAKE_ARGS)" \
	  $(BIN)/pip install -q --no-build-isolation -e ".[test,demo,lint]"
	touch $@

# The extra of what is installed already, so pip adds only Apple's packages.
$(CONVERTER): $(INSTALLED)
	$(BIN)/pip install -q "coreai-torch-rmsnorm[convert]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
