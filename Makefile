# make quickstart   train, evaluate and plot a small DRT beside its baseline on this machine
# make needle       train, evaluate and plot a small DRT that finds needles at 64 times its training length
# make test         everything that needs no GPU
# make lint         style and types
# make bench        the CPU benchmark rows
# All of them create the environment first. Choose the interpreter with PYTHON=python3.12.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Threads that wait without spinning: on a busy machine spinning costs more than it saves.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: quickstart needle test lint bench env env-dev clean

quickstart: env
	$(BIN)/python train.py recipe=quickstart
	$(BIN)/python train.py recipe=quickstart_sliding_window
	$(BIN)/python eval.py recipe=quickstart_perplexity
	$(BIN)/python generate.py model.path=runs/quickstart_laptop/model prompt='def main(' task.max_new_tokens=80 task.temperature=0.7
	@echo "figures: runs/quickstart_perplexity/*.png   training: .venv/bin/tensorboard --logdir runs"

needle: env
	$(BIN)/python train.py recipe=needle_laptop
	$(BIN)/python train.py recipe=needle_laptop_sliding_window
	$(BIN)/python eval.py recipe=needle_laptop_passkey
	@echo "figure: runs/needle_laptop_passkey/passkey.png"

test: env-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=8

lint: env-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: env
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.run

env: $(VENV)/.installed
env-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Longhaul needs Python 3.11 to 3.13, got $$($(PYTHON) --version 2>&1); try make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV)
