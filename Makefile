# Every target only calls commands that can be typed by hand; the README shows them.

# The interpreter that makes .venv, and the build of torch in it. The CPU build is enough for the tests and the
# quickstart; for a GPU: make install TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
# What test-oldest makes its environment with: the lowest Python and torch of setup.cfg, or PYTHON where that Python is
# missing. PyPI has only the CUDA build of that torch (5 GB).
LOWEST := $(shell sed -n 's/^python_requires = >=//p' setup.cfg)
OLDEST_PYTHON ?= $(or $(shell for python in python$(LOWEST) "$$HOME"/.pyenv/versions/$(LOWEST).*/bin/python; do \
  "$$python" -c 'import ensurepip' 2>/dev/null && echo "$$python" && break; done),$(PYTHON))
OLDEST_TORCH ?= torch==$(shell sed -n 's/^ *torch>=\([0-9.]*\),.*/\1/p' setup.cfg)
# Test processes at a time; many tests start up to four ranks of their own
JOBS ?= 2
WORKERS := -n $(JOBS) --dist loadfile --no-loadscope-reorder

VENV := .venv
OLDEST := .venv-oldest
# One test file or more for each of: the method, layouts, kernels, loading, data, checkpoints, the commands
CORE := $(patsubst %,tests/test_%.py,method selection recompute_inputs packing kernels_adamw kernels_build kernels_masks \
  kernels_packing kernels_sampled kernels_scatter kernels_triton files config cli loading exchange data checkpoint)
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
PIP_READER = $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps
# pip must not offer or use anything outside .venv
export PYTHONNOUSERSITE := 1

# Where the quickstart keeps things: model, pruned model and text are inputs, the run is seft train's folder
MODEL := models/SmolLM2-135M-Instruct
PRUNED := models/SmolLM2-135M-Instruct-pruned60
TEXT := data/pydoc-topics
RUN := runs/quickstart

.DELETE_ON_ERROR:
.PHONY: help install readers oldest has-oldest quickstart wheels test test-quick test-long test-oldest test-plain lint format \
  docs clean-quickstart clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

quickstart: $(RUN)/summary.json  ## a real model: prune, repair (2 ranks, ZeRO-3; 1 on 1 GPU), evaluate, report
	@echo "Results: $(RUN)/summary.json, the repaired model in $(RUN)/model"
	@echo "The page to look at: file://$(abspath $(RUN)/report.html)"

install: $(INSTALLED)  ## make .venv and install everything into it

wheels:  ## make wheels DIR=... FOR_TORCH=2.11.0: what a machine without network needs beyond that torch
	$(PYTHON) launch/wheels.py --output $(DIR) --torch $(FOR_TORCH) $(if $(EXTRAS),--extras '$(EXTRAS)')

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[train,deepspeed,mpi4py,plots,eval,baselines,quickstart,runtime,dev,docs]'
	touch $@

# Other versions of transformers, beside torch and all else of .venv: what we write must say the same to them
READERS := .readers/4.55/transformers .readers/5.0/transformers

readers: $(READERS)  ## the oldest and an early version of transformers that must read what is written

.readers/4.55/transformers: | $(INSTALLED)
	$(PIP_READER) --target .readers/4.55 transformers==4.55.4 tokenizers==0.21.4 huggingface_hub==0.36.0

.readers/5.0/transformers: | $(INSTALLED)
	$(PIP_READER) --target .readers/5.0 transformers==5.0.0 tokenizers==0.22.2 huggingface_hub==1.3.0 \
	  httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 anyio==4.12.0 certifi idna sniffio

test: lint  ## lint, types and the tests, without those of test-long
	python -m pytest $(WORKERS) -m 'not long'

test-long: $(INSTALLED)  ## the tests that "make test" leaves out: further layouts, the kill loop
	python -m pytest $(WORKERS) -m long

test-quick: $(INSTALLED)  ## the tests that take under a minute together
	python -m pytest $(WORKERS) -m 'not slow and not long'

oldest: $(OLDEST)/.installed  ## an environment with the lowest releases that setup.cfg admits, beside .venv

$(OLDEST)/.installed: setup.cfg .ci/lower_bounds.py
	rm -rf $(OLDEST)
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST_PYTHON) .ci/lower_bounds.py >$(OLDEST)/lower_bounds.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check $(OLDEST_TORCH)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/lower_bounds.txt \
	  -e '.[train,deepspeed,mpi4py]' pytest pytest-timeout pytest-xdist hypothesis triton
	touch $@

# For .ci/run, which counts a failed "make oldest" only where its torch can be had
has-oldest:
	$(OLDEST_PYTHON) -m pip install --quiet --disable-pip-version-check --dry-run --no-deps --ignore-installed $(OLDEST_TORCH)

test-oldest: oldest  ## the core of the tests there; of another Python and torch: OLDEST_PYTHON=... OLDEST_TORCH=...
	PATH=$(CURDIR)/$(OLDEST)/bin:$$PATH python -m pytest $(WORKERS) -m 'not slow and not long' $(CORE)

# Instructions of torch's own kernels, of oneDNN, MKL and our C++ kernels
PLAIN := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE CXX="c++ -march=x86-64" \
  TORCH_EXTENSIONS_DIR=$(CURDIR)/build/plain

test-plain: $(INSTALLED)  ## the core of the tests, pruning and layouts, as on another processor: plain x86-64
	$(PLAIN) python -m pytest $(WORKERS) -m 'not long' $(CORE) tests/test_pruning_methods.py tests/test_compensate.py \
	  tests/test_layouts.py tests/test_pattern_layouts.py tests/test_vectors.py

lint: $(INSTALLED)  ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

format: $(INSTALLED)  ## rewrite the files as ruff wants them
	ruff check --fix .
	ruff format .

docs: $(INSTALLED)  ## the pages of docs/ and the reference from docstrings as a site: build/site/index.html
	python -m sphinx --fail-on-warning --keep-going --quiet docs build/site

# The quickstart's steps. "|" means: needed first, but its date does not matter; what is there is used as it is.
# "make clean-quickstart" starts over.
$(MODEL)/config.json: | $(INSTALLED)
	seft quickstart model --output $(MODEL)

$(TEXT)/heldout.jsonl: | $(INSTALLED)
	seft quickstart text --output $(TEXT)

$(PRUNED)/config.json: | $(MODEL)/config.json $(TEXT)/heldout.jsonl
	seft prune --model.path $(MODEL) --method curvature --group global --compensate true --sparsity 0.6 \
	  --data.path $(TEXT)/train.jsonl --data.seq_len 256 --sequences 32 --output $(PRUNED)

$(RUN)/result.json: | $(PRUNED)/config.json
	if [ "$$(nvidia-smi -L 2>/dev/null | wc -l)" = 1 ]; then seft train --config quickstart --global_batch 4; \
	  else deepspeed --num_gpus 2 --module seft_dist train --config quickstart --deepspeed zero3; fi

$(RUN)/eval.json: | $(RUN)/result.json
	seft evaluate --models.dense $(MODEL) --models.pruned $(PRUNED) --models.repaired $(RUN)/model \
	  --data.path $(TEXT)/heldout.jsonl --data.seq_len 512 --output $@

$(RUN)/summary.json: | $(RUN)/eval.json
	seft report $(RUN)

clean-quickstart:  ## remove the quickstart's pruned model and run; the downloaded model stays
	rm -rf $(PRUNED) $(RUN)

clean: clean-quickstart  ## remove everything that make has made
	rm -rf $(VENV) $(OLDEST) .readers $(MODEL) $(TEXT) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
