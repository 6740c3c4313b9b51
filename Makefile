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

CPP_FILES = $$(find csrc tests/simt examples/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo converter test test-slow test-cpp test-cuda test-aarch64 bench bench-cuda build docs lint format clean
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

test-slow: $(INSTALLED)  ## the slow tests
	$(BIN)/python -m pytest -q -m slow

test-cpp: $(INSTALLED)  ## the framework-free library's own tests
	$(BIN)/cmake -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DCOREAI_TORCH_WERROR=ON > /dev/null
	$(BIN)/cmake --build build/cpp
	$(BIN)/ctest --test-dir build/cpp --output-on-failure

test-cuda: $(INSTALLED)  ## the tests on a CUDA card, a few of them under compute-sanitizer
	$(BIN)/python -m pytest -q tests/test_cuda.py
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest -q tests/test_cuda.py \
	  -k "test_layouts or test_heads or (test_accuracy and bfloat16-float32)"
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest -q tests/test_cuda.py \
	  -k "test_the_same_bits"

test-aarch64:  ## the C++ tests on aarch64, cross-compiled and emulated
	cmake -S . -B build/aarch64 -G Ninja --toolchain cmake/aarch64-linux-gnu.cmake \
	  -DCOREAI_TORCH_WERROR=ON > /dev/null
	cmake --build build/aarch64
	ctest --test-dir build/aarch64 --output-on-failure

bench: $(INSTALLED)  ## measure against PyTorch and write benchmarks/results/
	$(BIN)/python benchmarks/bench_rms_norm.py --json benchmarks/results/cpu.json
	$(BIN)/python benchmarks/report.py benchmarks/results/cpu.json

bench-cuda: $(INSTALLED)  ## measure on a CUDA card and write benchmarks/results/cuda.{json,md}
	$(BIN)/python benchmarks/bench_rms_norm_cuda.py --json benchmarks/results/cuda.json

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
