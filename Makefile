# Everything from a fresh clone: python3 (3.11 or newer), make and a package index are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help train test lint format audit report render bench clean

help:
	@echo "make train   set up .venv, train AlexNet: the full Fashion-MNIST on a CUDA GPU, a short run on the shipped sample else"
	@echo "make test    set up .venv, run the whole test suite (on the GPU if there is one, else in Triton's interpreter)"
	@echo "make lint    ruff and mypy"
	@echo "make audit   what a training step launches, compiled for an H100 that need not be there"
	@echo "make report  measure everything against every peer (needs a CUDA GPU, under nine minutes)"
	@echo "make bench   time every operation against PyTorch (needs a CUDA GPU)"

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# Without a GPU the recipe's 4,690 steps would take days: two epochs of small steps on 1,000 images instead, ARGS to change it.
train: $(INSTALLED)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/alexnet-triton train $(ARGS); \
	else $(BIN)/alexnet-triton train --data sample --batch-size 8 --lr 0.03 --epochs 2 $(ARGS); fi

test: $(INSTALLED)
	$(BIN)/python -m pytest -q --numprocesses $(WORKERS) --timeout 300 $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

audit: $(INSTALLED)
	$(BIN)/python -m benchmarks.audit $(ARGS)

report: $(INSTALLED)
	$(BIN)/python -m benchmarks.report $(ARGS)

render: $(INSTALLED)
	$(BIN)/python -m benchmarks.render --readme $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
