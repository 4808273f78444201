# Everything a checkout needs, from nothing but python3 (3.10 or newer, with venv) and g++:
#
#   make demo         see it work
#   make test         run the tests
#
#   make build        compile again what changed
#   make lint         ruff, mypy, clang-format
#   make cuda-check   compile every kernel for all architectures; registers, occupancy, spills, sizes
#   make bench        the benchmarks: a table, and build/bench.html with pictures (BENCH=--quick: two minutes)
#   make device       on a machine with a GPU: build, test, sanitize and measure; one results file
#   make clean        remove what was built (make distclean: the virtual environment too)
#
# PYREID_NO_CUDA, FORCE_CUDA, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what the README says.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYREID_EMULATED ?= 1

BUILD_FILES := pyproject.toml setup.py $(wildcard build_tools/*.py)
SOURCES := $(wildcard csrc/* csrc/*/*)
# What decides what is built: when it changes, there is something to build.
SETTINGS := $(PYREID_EMULATED)|$(PYREID_NO_CUDA)|$(FORCE_CUDA)|$(CUDA_HOME)|$(CUDA_PATH)|$(TORCH_CUDA_ARCH_LIST)|$(PYREID_WHEEL)|$(CXX)|$(CXXFLAGS)|$(LDFLAGS)

.PHONY: demo test build lint cuda-check bench device clean distclean force

demo: build
	$(BIN)/pyreid demo

test: build
	$(BIN)/python -m pytest -q

build: $(VENV)/built

lint: $(VENV)/extra-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

cuda-check: build/toolkit/ready
	build/toolkit/bin/python build_tools/resources.py

bench: build $(VENV)/extra-bench
	$(BIN)/pyreid bench $(BENCH) --json build/bench.json --html build/bench.html

device:
	bash benchmarks/device.sh

clean:
	rm -rf build dist *.egg-info pyreid/_build.py pyreid/_*.so $(VENV)/built $(VENV)/extra-*

distclean: clean
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("pyreid needs Python 3.10 or newer, not " + sys.version) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/settings: force | $(BIN)/python
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@

# pip brings what the build needs, compiles what changed, and installs in place; 21.3 is the first
# pip that can.
$(VENV)/built: $(SOURCES) $(BUILD_FILES) $(VENV)/settings | $(BIN)/python
	@echo "Building pyreid in $(VENV) (minutes the first time, seconds later)"
	$(BIN)/python -m pip install -q 'pip>=21.3'
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

$(VENV)/extra-%: pyproject.toml | $(VENV)/built
	$(BIN)/python -m pip install -q -e '.[$*]'
	touch $@

# nvcc from the package index where the machine has none; no GPU or driver is needed to compile.
build/toolkit/ready: build_tools/toolkit.py
	$(PYTHON) -m venv build/toolkit
	packages=$$(PYREID_WHEEL=1 PYREID_NO_CUDA= build/toolkit/bin/python build_tools/toolkit.py requirements); \
	    test -z "$$packages" || build/toolkit/bin/python -m pip install -q $$packages
	touch $@
