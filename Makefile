# Everything that must be remembered: make train, make test, make check, make bench. Of one room: make test-room ROOM=styles.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CONFIG ?= configs/laptop.yaml

# Each process of a run starts a second sooner where compiled sources are kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test test-all test-room test-gpus composed check bench format clean

train: $(STAMP)
	$(BIN)/colrow train $(CONFIG)

# Two workers; --no-loadscope-reorder starts the longest files first, as tests/conftest.py sorts them.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) $(ARGS)

# And the further variants of its proofs: docs/tests.md lists them.
test-all: $(STAMP)
	$(PYTEST) --exhaustive $(ARGS)

# One room's tests (a package or a module of src/colrow): tests/ROOM, tests/test_ROOM.py, and what proves it elsewhere.
# What takes a minute by itself is left to make test.
ranks_of = $(patsubst %,tests/distributed/test_%.py,$(1))
ROOM_checkpoint := $(call ranks_of,checkpoint_meshes)
ROOM_config_sections := tests/test_config.py
ROOM_derive := --ignore tests/derive/test_families.py
ROOM_dryrun := tests/checking/test_mutants.py
ROOM_errors := tests/plans/test_one_answer.py
ROOM_models := $(call ranks_of,tensor_parallel)
ROOM_ops := $(call ranks_of,chunked linear_cross_entropy copy_engine_agreement)
ROOM_parallel := $(call ranks_of,pipeline linear_head every_mesh)
ROOM_sharding := $(call ranks_of,styles)
ROOM_styles := tests/plans $(call ranks_of,styles linear_head fast_styles)
ROOM_torch_compat := tests/test_torch_compat_fsdp2.py
ROOM_train := $(call ranks_of,training compute_weights)
room = $(wildcard tests/$(ROOM) tests/test_$(ROOM).py) $(ROOM_$(ROOM))

test-room: $(STAMP)
	test -n "$(ROOM)" -a -n "$(strip $(room))"  # ROOM=styles, or another package or module of src/colrow
	$(PYTEST) $(room) $(ARGS)

# The check against two ranks, on models composed at random: SEEDS of them, a table on the screen. Exits with 1 where the
# check misses a wrong plan, or calls too many right ones unproven. For a nightly run: .ci/nightly.
SEEDS ?= 300
composed: $(STAMP)
	PYTHONPATH=src:. $(BIN)/python -m benchmarks.composed.judge --cases $(SEEDS) $(ARGS)

# The tests of several ranks on this host's GPUs, a process for each file: what hangs ends alone, and every result is
# there as it comes. Tests that need more GPUs than there are, are skipped. FILES="..." takes some of them.
FILES ?= $(wildcard tests/distributed/test_*.py)
test-gpus:
	for file in $(FILES); do \
	  PYTHONPATH=src:tests timeout 480 $(PYTHON) -m pytest -v --exhaustive --device cuda --rank-timeout 150 $$file || failed="$$failed $$file"; \
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
