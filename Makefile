# make run: install what this machine can use, tune, and do the main job on real input.
# make test: the same, then every test layer this machine can run.
# make tables: the shipped tables of configs, before a release. make pictures: those of the docs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CUDA 13 or 12 as the driver says; without a driver the simulator, and the compilers for inspecting.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')
GPU_EXTRA := $(if $(filter 12,$(CUDA)),cu12,$(if $(CUDA),cu13,))
SIMULATE := $(if $(GPU_EXTRA),,NUMBA_ENABLE_CUDASIM=1)
# The newest drivers run both; an old one neither.
EXTRA := $(or $(GPU_EXTRA),compile)
# What examples/real_activations.py runs: measured on a GPU, predicted for what the simulator is.
TUNE := --pass forward --dtype float16 --head-dim 32 --seqlen 128 --mask full
TUNE += $(if $(GPU_EXTRA),--batch 2 --heads 12 --time-budget 60,--batch 1 --heads 4 --device sm_80 --offline --trials 12)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Where the environment forbids bytecode each process of a run would compile all sources anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: run test lint tables pictures clean

run: $(VENV)/run.done
	@$(BIN)/numflash-tune $(TUNE)
	@$(SIMULATE) $(BIN)/python examples/real_activations.py

# Both processes run, also where the first one fails: one run shows all failures.
test: $(VENV)/test.done lint
	@failed=0; \
	NUMBA_ENABLE_CUDASIM=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal \
		tests/host tests/sim tests/executed tests/frontends || failed=1; \
	$(BIN)/python -m pytest -q -n 2 --dist worksteal \
		tests/host/numflash/bad_input tests/host/numflash/test_*_stubbed.py \
		tests/host/numflash/test_tensor_map*.py tests/host/numflash/test_memory.py \
		tests/host/numflash/test_stream_order.py tests/host/bench/test_one_kernel.py \
		tests/compile tests/gpu || failed=1; \
	exit $$failed

lint: $(VENV)/test.done
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# Shipped tables that are stale, predicted again; goes on where it was stopped.
tables: $(VENV)/run.done
	@$(BIN)/python -m tuner.shipping

# Drawn by formula: the same on every machine.
pictures: $(VENV)/run.done
	@NUMFLASH_TUNED=0 $(BIN)/python -m numflash_tuner.explain.picture docs/one_sm.svg

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.done: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q -e ".[$(EXTRA),tune]"
	@touch $@

# All that `run` needs is there, too.
$(VENV)/test.done: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q -e ".[$(EXTRA),postgresql,test]"
	@touch $(VENV)/run.done $@

clean:
	rm -rf $(VENV) build/test-cache build/tables .pytest_cache .ruff_cache *.egg-info
