# On a fresh machine: `make quickstart`, then `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export DS_ACCELERATOR ?= cpu
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help install cuda-env quickstart test test-landing test-cuda test-all test-newest newest-tests lint format clean

help:
	@echo "make install       virtual environment in $(VENV) with hdscale and its test tools"
	@echo "make quickstart    install, then train, evaluate and test the embedded default on two CPU ranks"
	@echo "make lint          formatter, ruff, types, and the order of imports"
	@echo "make format        format the code and correct what ruff can correct"
	@echo "make test          the fast tests (at most 10 minutes on two cores)"
	@echo "make test-landing  slow tests that must pass before each merge"
	@echo "make test-cuda     tests on simulated GPUs, under a CUDA build of torch in $(CUDA_VENV) (7 GB, made by make cuda-env)"
	@echo "make test-newest   the fast tests of model, operator, engine and evaluation with the newest versions that"
	@echo "                   pyproject.toml allows, in $(NEWEST_VENV); writes tests/last_newest_run.md"
	@echo "make test-all      all tests (real SLURM, a browser, long drills); writes tests/last_full_run.md"

# CONSTRAINTS= (empty) installs the newest versions that pyproject.toml allows, CUDA builds of torch among them
CONSTRAINTS ?= constraints.txt

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[test,tensorboard]'
	touch $@

# A CUDA build of torch, and nvcc; no GPU is needed. Python 3.11 is what the simulated GPUs were tried with.
CUDA_VENV := .venv-cuda
CUDA_PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo $(PYTHON))
cuda-env: $(CUDA_VENV)/installed

$(CUDA_VENV)/installed: pyproject.toml constraints-cuda.txt
	$(CUDA_PYTHON) -m venv --clear $(CUDA_VENV)  # another Python may have made the one that is there
	$(CUDA_VENV)/bin/python -m pip install -q --upgrade pip
	$(CUDA_VENV)/bin/python -m pip install -q -c constraints-cuda.txt -e '.[test]' nvidia-cuda-nvcc nvidia-cuda-cccl
	$(CUDA_VENV)/bin/python -m tests.simulated_gpu.toolkit
	touch $@

quickstart: install
	$(BIN)/deepspeed --num_accelerators 2 hdscale/train.py --config configs/quickstart.yaml $(ARGS)

test: install
	$(BIN)/python -m pytest -q -m "not slow and not cuda" $(ARGS)

test-landing: install
	$(BIN)/python -m pytest -q -m "slow and landing" $(ARGS)

test-cuda: install
	$(BIN)/python -m pytest -q -m "cuda and not slow" tests/simulated_gpu $(ARGS)

test-all: install
	$(BIN)/python -m pytest -q --record tests/last_full_run.md $(ARGS)

# An environment of its own, with the newest of all libraries: a CUDA build of torch among them (7 GB). Run it before
# a bound in pyproject.toml is changed.
NEWEST_VENV ?= .venv-newest
NEWEST := bases modeling ops engine evaluation
test-newest:
	$(MAKE) install VENV=$(NEWEST_VENV) CONSTRAINTS=
	$(NEWEST_VENV)/bin/python -m pip install -q --upgrade --upgrade-strategy eager -e '.[test,tensorboard]'
	$(MAKE) newest-tests VENV=$(NEWEST_VENV) CONSTRAINTS=

newest-tests:
	$(BIN)/python -m pytest -q -m "not slow" --record tests/last_newest_run.md --record-of test-newest \
	  $(NEWEST:%=tests/%) $(ARGS)

CODE := hdscale tests tools
lint: install
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/python -m tests.helpers.house

format: install
	$(BIN)/ruff check --fix-only $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf $(VENV) $(CUDA_VENV) build runs
