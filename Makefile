# Two commands from a fresh machine: make demo, make test. The environment is made on the way.
SHELL := /bin/sh
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest
EXTRAS := training,data,plot,dev
TRANSFORMERS4 := transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2
FA4 := --pre "flash-attn-4[cu13]==4.0.0b36"
# unit tests that train, or start many processes
SLOW := report_browser check_gpu examples engine study_runs slurm_node benchmarks weights spec flag_rules costs
SLURM_TOOLS := munged slurmctld slurmd sbatch shellcheck ip
SLURM_PACKAGES := munge slurmctld slurmd slurm-client shellcheck iproute2

.PHONY: help install demo study newcomer test test-quick test-releases test-te test-slurm test-fa4 test-main test-bridge evaluation-environment test-evaluate browser bench docs check format lint types clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY)  ## the environment in .venv (torch with CUDA libraries: about 6 GB)

$(READY): setup.py pyproject.toml constraints.txt tools/find_python.sh
	@python=$$(tools/find_python.sh) && echo "environment: $$python -> $(VENV)" && \
	  { [ -x $(BIN)/python ] || $$python -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

demo: $(READY)  ## pretrain a small model twice, constant window and SkyLadder; table and plot
	SKYLADDER_DEVICE=cpu $(BIN)/skyladder demo --output demo

study: $(READY)  ## a queue of small runs that compares schedules; Ctrl-C saves, again goes on
	$(BIN)/skyladder study --run --output study

newcomer:  ## the base install on Python 3.10 to 3.13: the first commands, each under two seconds
	tools/newcomer.sh

test: $(READY)  ## the whole suite
	$(PYTEST)

test-quick: $(READY)  ## arithmetic, parsers, commands: what starts no training (under 90 s)
	$(PYTEST) tests/unit $(foreach name,$(SLOW),--ignore tests/unit/test_$(name).py)

test-releases: $(READY)  ## our entry point on older wheels; checkouts from SKYLADDER_MEGATRON_CHECKOUTS
	$(BIN)/python tests/releases/unpack_wheels.py .venv-releases
	SKYLADDER_MEGATRON_WHEELS=.venv-releases $(PYTEST) tests/releases

test-main: $(READY)  ## MEGATRON=a checkout of Megatron's main: what moved, and the last row's tests
	@[ -n "$(MEGATRON)" ] || { echo "give a checkout: make test-main MEGATRON=DIR"; exit 2; }
	-$(BIN)/python tools/what_moved.py $(MEGATRON)
	folder=$$(mktemp -d) && ln -s $(abspath $(MEGATRON)) $$folder/main && \
	  SKYLADDER_MEGATRON_CHECKOUTS=$$folder $(PYTEST) tests/releases -k main

test-te: $(READY)  ## Transformer Engine, flash-attn and varlen with CPU stubs (builds TE once)
	$(BIN)/python tests/te/build_te.py --python $(BIN)/python --venv .venv-te
	SKYLADDER_BRIDGE_PACKAGES=$(wildcard .venv-bridge/lib/python3.12/site-packages) \
	  PYTHONPATH=. .venv-te/bin/python -m pytest tests/te

test-bridge: $(READY)  ## Megatron Bridge from the index, on the CPU, beside the entry point
	$(BIN)/python tests/bridge/build_bridge.py --python $(BIN)/python --venv .venv-bridge
	PYTHONPATH=. .venv-bridge/bin/python -m pytest tests/bridge

.venv-fa4/.ready: $(READY) Makefile
	$(BIN)/python -m venv .venv-fa4
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > $$(.venv-fa4/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	.venv-fa4/bin/python -m pip install --quiet --disable-pip-version-check $(FA4)
	@touch $@

test-fa4: .venv-fa4/.ready  ## FlashAttention 4's kernels, compiled for Hopper and Blackwell
	SKYLADDER_FA4_PYTHON=.venv-fa4/bin/python $(PYTEST) tests/fa4

$(VENV)/.evaluate: $(READY) setup.py pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[evaluate]"
	@touch $@

.venv-transformers4:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.partial \
	  $(TRANSFORMERS4)
	@mv $@.partial $@

evaluation-environment: $(VENV)/.evaluate .venv-transformers4

test-evaluate: evaluation-environment  ## models in and out, and their evaluation
	SKYLADDER_TRANSFORMERS4=.venv-transformers4 $(PYTEST) tests/hugging_face tests/evaluation

test-slurm: $(READY)  ## jobs on a real Slurm on this machine (as root; installs it with apt)
	@for tool in $(SLURM_TOOLS); do command -v $$tool >/dev/null || missing=$$tool; done; \
	  [ -z "$${missing:-}" ] || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES); }
	$(PYTEST) -m slurm tests/slurm

browser:  ## Chromium, which the report is tested in (installs it with apt where that works)
	@command -v chromium >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends chromium; } || \
	  echo "no Chromium here: tests/unit/test_report_browser.py is skipped"

bench: $(READY)  ## what SkyLadder costs and saves beside stock Megatron, as ratios
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/context_parallel_ranks.py

$(VENV)/.docs: $(READY) pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[docs]"
	@touch $@

docs: $(VENV)/.docs  ## the documentation as a site, docs/_build/index.html; a dead link is an error
	$(BIN)/python tools/write_tables.py
	$(BIN)/sphinx-build --quiet --nitpicky --fail-on-warning --keep-going docs docs/_build

check: $(READY) lint types test  ## formatting, lint, types and the suite, as CI does

format: $(READY)  ## rewrite the formatting
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)  ## formatting, lint, and the layers that imports have to keep
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo

types: $(READY)  ## mypy
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests/unit tests/distributed

clean:  ## remove the environment and what the demo wrote
	rm -rf $(VENV) .venv-te .venv-bridge .venv-releases .venv-transformers4 demo build docs/_build *.egg-info
