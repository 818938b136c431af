# Every verb starts from nothing but Python >= 3.10, a C++ compiler (g++ >= 11 or clang++ >= 14) and make: what it needs
# goes to .venv, once. CI calls the same verbs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LINTERS := $(VENV)/.linters
CPP := $(shell find csrc tests/emulator -type f)

.PHONY: help demo test bench lint format asan asan-cpu asan-cuda gpu clean

help:
	@echo 'make demo     photographs through pyzoo and torchvision, side by side; trains a Mask R-CNN: out/demo, out/bench'
	@echo 'make test     the test suite'
	@echo 'make bench    every benchmark: out/bench'
	@echo 'make lint     what CI checks: ruff, clang-format; make format fixes it'
	@echo 'make asan     the tests of the kernels, CUDA ones emulated, under the address and undefined behaviour sanitizers'
	@echo 'make gpu      build, tests and benchmarks on a GPU, with what the Python at hand has: out/gpu, benchmarks/results'
	@echo 'make clean    removes all that was built; .venv stays'
	@echo 'PYTHON=python3.12 chooses the interpreter, VENV=path another place than .venv'

demo: $(INSTALLED)
	$(BIN)/python demo/photographs.py
	$(BIN)/pyzoo bench --quick
	$(BIN)/pyzoo reproduce mask_rcnn -o out/demo
	@echo 'Now look at out/demo/*.png and out/bench/index.html'

test: $(INSTALLED)
	$(BIN)/python -m pytest

bench: $(INSTALLED)
	$(BIN)/pyzoo bench

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info < (3, 10) and sys.exit("pyzoo needs Python >= 3.10: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# Installed again, which compiles what changed, when a source of the core or the build itself is newer.
$(INSTALLED): $(CPP) setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[demo,test]'
	@touch $@

# The versions stand in .pre-commit-config.yaml, too: a formatter of another version formats differently.
$(LINTERS): Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet ruff==0.17.6 clang-format==23.1.5
	@touch $@

lint: $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(LINTERS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# In a copy of the tree, so that the build in use stays as it is; CUDA kernels are emulated on the CPU. Left out is what takes long
# there and runs no more of our code.
# A finding ends the process: with --capture=sys its report is seen.
ASAN := build/asan
ASAN_CXX ?= g++
ASAN_FLAGS := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all
ASAN_TREE := setup.py pyproject.toml README.md LICENSE csrc kernels pyzoo benchmarks tests
ASAN_TESTS := tests/test_ops.py tests/test_numpy.py $(wildcard tests/test_fuzz*.py $(patsubst csrc/%,tests/test_%.py,$(wildcard csrc/*)))
ASAN_CUDA_TESTS := tests/test_gpu_kernels.py
ASAN_SKIP := triton or compile or export or opcheck or gradcheck or gradgradcheck or func or more_than_int32

asan: $(INSTALLED)
	$(BIN)/python -m pip install --quiet 'setuptools>=77' 'pybind11>=2.13' ninja
	mkdir -p $(ASAN)
	cd $(ASAN) && rm -rf $(ASAN_TREE)
	cp -Rp $(ASAN_TREE) $(ASAN)
	cd $(ASAN) && CXX='$(ASAN_CXX)' CXXFLAGS='-O1 -g1 -fno-omit-frame-pointer $(ASAN_FLAGS)' LDFLAGS='$(ASAN_FLAGS)' PYZOO_CUDA=emulate \
	  $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	$(MAKE) --jobs --output-sync VENV='$(VENV)' asan-cpu asan-cuda

asan-cpu: TESTS := $(ASAN_TESTS)
asan-cuda: TESTS := $(ASAN_CUDA_TESTS)
asan-cpu asan-cuda:
	cd $(ASAN) && LD_PRELOAD="$$(for lib in asan ubsan stdc++; do $(ASAN_CXX) -print-file-name=lib$$lib.so; done | xargs)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYZOO_FUZZ=$${PYZOO_FUZZ:-50} \
	  $(abspath $(BIN))/python -m pytest --capture=sys $(TESTS) -k 'not ($(ASAN_SKIP))'

# On a machine that may have no network: nothing is installed.
gpu:
	PYTHON='$(PYTHON)' benchmarks/gpu.sh

clean:
	rm -rf build dist out *.egg-info pyzoo/_C*.so .pytest_cache .ruff_cache .benchmarks $(INSTALLED)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
