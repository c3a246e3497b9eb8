# Everything from a fresh clone: python3 (3.11 or newer), make and a package index are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
WORKERS ?= 2
# The checks of the kernels' IR want Python 3.12 or 3.13, wherever there is one, and an environment of their own.
PYTHONS_FOR_IR := python3.12 python3.13 $(PYTHON) $(wildcard $(HOME)/.pyenv/versions/3.1[23].*/bin/python)
IR_PYTHON ?= $(firstword $(foreach python,$(PYTHONS_FOR_IR),$(shell $(python) -c \
	'import sys; (3, 12) <= sys.version_info < (3, 14) and print(sys.executable)' 2>/dev/null)))
IR_VENV ?= .venv-sanitize
LOWEST_VENV ?= .venv-lowest
NEWEST_VENV ?= .venv-newest
DOCS_VENV ?= .venv-docs
DIST_VENV ?= .venv-dist

.DEFAULT_GOAL := help
.PHONY: help train test test-all test-slow test-lowest test-newest test-dist fuzz mutation sanitize ir-python sanitize-ir lint \
	format audit accuracy report profile host stream kernelbench gpu stale render docs dist bench clean

help:
	@echo "make train        trains AlexNet: full Fashion-MNIST on a CUDA GPU, else a short run on the shipped sample and a check of the kernels"
	@echo "make test         runs the tests, on a CUDA GPU or in Triton's interpreter (8 to 17 minutes on two cores)"
	@echo "make test-all     runs make test, then the cases that it leaves out for their time"
	@echo "make test-lowest  runs all tests on the lowest versions of torch, Triton and the other packages that are supported"
	@echo "make test-newest  runs all tests on the newest Triton, beside a torch that asks for an older one"
	@echo "make test-dist    trains from the wheel, installed into an empty environment"
	@echo "make sanitize     runs the kernels under a sanitizer: compute-sanitizer on a CUDA GPU, else ttsem (Python 3.12 or 3.13)"
	@echo "make fuzz         compares 5,000 random calls with float64 (FUZZ_EXAMPLES=n for n, FUZZ_SEED=n repeats a run)"
	@echo "make mutation     plants faults in the kernels one by one and shows that the tests catch each"
	@echo "make accuracy     prints every operation's error against float64 beside PyTorch's (under ten minutes on a CPU)"
	@echo "make lint         checks the code with ruff and mypy; make format formats it"
	@echo "make docs         builds the pages into build/site"
	@echo "make dist         builds the sdist, and the wheel from it, into build/dist"
	@echo "make audit        lists what a training step launches, compiled for an H100; no GPU is needed"
	@echo "make host         measures how long Python takes on a training step and on each operation, beside PyTorch; no GPU is needed"
	@echo "make stream       measures how fast images are read during training, beside torchvision's loader (ARGS=--memory, --listing, --cuda)"
	@echo "make bench        times every operation against PyTorch by pytest-benchmark (without a CUDA GPU its host time)"
	@echo "make kernelbench  verifies KernelBench's AlexNet and LeNet-5, fused, and on a CUDA GPU times them beside PyTorch"
	@echo "make report       measures everything against every peer (needs a CUDA GPU, under nine minutes)"
	@echo "make profile      times every kernel of a training step beside its floor (needs a CUDA GPU)"
	@echo "make gpu          runs everything that needs a CUDA GPU, in order of worth, resumable (ARGS='--minutes N'; without a GPU ARGS=--dry)"
	@echo "make stale        lists the kernels and configurations that have changed since they were measured"
	@echo "make render       writes the tables and pictures of the README and the pages from what is recorded"

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# Without a GPU the recipe's 4,690 steps would take days: two epochs of small steps on 400 images instead, ARGS to change it.
# PyTorch computes them; the kernels then run the network in Triton's interpreter, on two images.
train: $(INSTALLED)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/alexnet-triton train $(ARGS); \
	else $(BIN)/alexnet-triton train --data sample --limit 400 --batch-size 8 --lr 0.005 --momentum 0.9 --epochs 2 --check $(ARGS); fi

# A thread for each of the processes: the threads of small operations only wait for each other.
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q --numprocesses $(WORKERS) --dist worksteal --timeout 900

test: $(INSTALLED)
	$(call PYTEST,$(VENV)) -m "not slow" $(ARGS)

test-all: test test-slow

test-slow: $(INSTALLED)
	$(call PYTEST,$(VENV)) -m slow $(ARGS)

test-lowest: $(LOWEST_VENV)/installed
	$(call PYTEST,$(LOWEST_VENV)) $(ARGS)

$(LOWEST_VENV)/installed: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint tests/lowest.txt
	@touch $@

test-newest: $(NEWEST_VENV)/installed
	$(call PYTEST,$(NEWEST_VENV)) $(ARGS)

# The packages of $(VENV), and before them Triton by itself: torch names the one version that it is built with.
$(NEWEST_VENV)/installed: $(INSTALLED) tests/newest.txt
	$(PYTHON) -m venv $(NEWEST_VENV)
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> $$(echo $(NEWEST_VENV)/lib/python3*/site-packages)/base.pth
	$(NEWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/newest.txt
	@touch $@

# One process, which counts its cases; the seed it prints first and last makes the same ones again.
fuzz: FUZZ_EXAMPLES ?= 5000
fuzz: $(INSTALLED)
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) FUZZ_SEED=$(FUZZ_SEED) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/kernels/test_fuzz.py --verbose $(ARGS)

mutation: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation $(ARGS)

# Out-of-bounds accesses, races, reads of uninitialized memory.
sanitize: $(INSTALLED)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python -m tests.sanitize $(ARGS); \
	elif test -n "$(IR_PYTHON)"; then $(MAKE) --no-print-directory sanitize-ir; \
	else echo "no Python 3.12: the IR checks are left out"; fi

# Fails where there is no Python for the IR checks.
ir-python:
	@test -n "$(IR_PYTHON)"

sanitize-ir: $(IR_VENV)/installed
	SANITIZE_IR=1 $(call PYTEST,$(IR_VENV)) tests/kernels -m "not slow_under_ttsem" $(ARGS)

$(IR_VENV)/installed: pyproject.toml
	$(IR_PYTHON) -m venv $(IR_VENV)
	$(IR_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[sanitize]'
	@touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

audit: $(INSTALLED)
	$(BIN)/python -m benchmarks.audit $(ARGS)

accuracy: $(INSTALLED)
	$(BIN)/python -m benchmarks.accuracy $(ARGS)

report: $(INSTALLED)
	$(BIN)/python -m benchmarks.report $(ARGS)

profile: $(INSTALLED)
	$(BIN)/python -m benchmarks.profile $(ARGS)

host: $(INSTALLED)
	$(BIN)/python -m benchmarks.host $(ARGS)

kernelbench: $(INSTALLED)
	$(BIN)/python -m benchmarks.kernelbench $(ARGS)

stream: $(INSTALLED)
	$(BIN)/python -m benchmarks.stream $(ARGS)

gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

stale: $(INSTALLED)
	$(BIN)/python -m benchmarks.stale

render: $(INSTALLED)
	$(BIN)/python -m benchmarks.render --pages $(ARGS)

docs: $(DOCS_VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build $(ARGS)

# What the extra names and no more: the pages are made without torch.
$(DOCS_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(DOCS_VENV)/requirements.txt
	@touch $@

dist: $(INSTALLED)
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist

# Away from the tree, so that nothing is imported from it.
test-dist: $(DIST_VENV)/installed
	cd $$(mktemp -d) && export PATH="$(abspath $(DIST_VENV))/bin:$$PATH" && \
		alexnet-triton train --data sample --model lenet --out run && TRITON_INTERPRET=1 alexnet-triton check run

$(DIST_VENV)/installed: dist
	$(PYTHON) -m venv --clear $(DIST_VENV)
	$(DIST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$$(echo build/dist/*.whl)[train]"
	@touch $@

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks $(ARGS)

clean:
	rm -rf $(VENV) $(IR_VENV) $(LOWEST_VENV) $(NEWEST_VENV) $(DOCS_VENV) $(DIST_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
