# On a fresh machine: `make quickstart`, then `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export DS_ACCELERATOR ?= cpu
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help install quickstart test test-all lint clean

help:
	@echo "make install     virtual environment in $(VENV) with hdscale and its test tools"
	@echo "make quickstart  install, then train, evaluate and test the embedded default on two CPU ranks"
	@echo "make test        the fast tests (at most 10 minutes on two cores)"
	@echo "make test-all    all tests: real SLURM, a browser, long drills as well"
	@echo "make lint        ruff over everything"

# CONSTRAINTS= (empty) installs the newest versions that pyproject.toml allows, CUDA builds of torch among them
CONSTRAINTS ?= constraints.txt

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[test,tensorboard]'
	touch $@

quickstart: install
	$(BIN)/deepspeed --num_accelerators 2 hdscale/train.py --config configs/quickstart.yaml $(ARGS)

test: install
	$(BIN)/python -m pytest -q -m "not slow" $(ARGS)

test-all: install
	$(BIN)/python -m pytest -q $(ARGS)

lint: install
	$(BIN)/ruff check hdscale tests

clean:
	rm -rf $(VENV) runs
