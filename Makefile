# Everything that must be remembered: make train, make test, make check, make bench.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CONFIG ?= configs/laptop.yaml

# Each process of a run starts a second sooner where compiled sources are kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test test-gpus check bench format clean

train: $(STAMP)
	$(BIN)/colrow train $(CONFIG)

# Two workers; --no-loadscope-reorder starts the files that hold few and long tests with the others, not after them.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The tests of several ranks on this host's GPUs, a process for each file: what hangs ends alone, and every result is
# there as it comes. Tests that need more GPUs than there are, are skipped. FILES="..." takes some of them.
FILES ?= $(wildcard tests/distributed/test_*.py)
test-gpus:
	for file in $(FILES); do \
	  PYTHONPATH=src:tests timeout 480 $(PYTHON) -m pytest -v --device cuda --rank-timeout 150 $$file || failed="$$failed $$file"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

check: $(STAMP)
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/colrow bench $(or $(ARGS),--shape laptop --tp 2 --seq-len 128 --micro-batch 4)

format: $(STAMP)
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

# torch goes first: with the pinned build in place no other requirement asks for a newer one.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build
