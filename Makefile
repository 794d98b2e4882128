# The guide's commands. `make help` lists them; a comment after two hashes is a target's help text.
# Set-up runs by itself where it is needed. Variables one may set:
#   PYTHON=python3.12            the interpreter that makes .venv
#   TORCH_INDEX=URL              package index for torch, where the usual one would pull CUDA builds
#   ARGS="--profile embedded"    more flags for train, evaluate, infer, merge, export-*, upload-* and pipeline
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
VENV := .venv
KIT := $(VENV)/bin/emergency-kit
BASE := models/SmolLM2-135M-Instruct/manifest.json
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet

.PHONY: help setup verify train evaluate infer merge export-gguf pipeline test test-tutorials storm clean bench-data bench-training measurer twins sweep bench-preference bench-inference bench-answers prove-structure serve bench-serve fuzz-serve screenshots kit prove-kit export-ollama export-lmstudio upload-hf upload-gguf bench-export bench-export-large bench-quantiser evaluate-ai evaluate-openai evaluate-gemini gate plan bench-plan prove-trackers prove-deepspeed prove-ranks bench-gpu bench-scaling setup-gpu prove-gpu-install docs test-docs

help: ## List these targets
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 22

# Anew where the lock, the Python or the folder is another than when it was made: dates alone do not tell.
STALE := $(if $(wildcard $(VENV)/installed.txt),$(shell VENV=$(VENV) bash scripts/setup.sh stale))
.PHONY: stale
$(VENV)/installed.txt: requirements.lock pyproject.toml $(STALE)
	@VENV="$(VENV)" PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" GOAL="$(MAKECMDGOALS)" bash scripts/setup.sh

$(BASE): | $(VENV)/installed.txt
	@$(KIT) setup

setup: $(VENV)/installed.txt $(BASE) ## Make .venv, install the pinned packages, prepare the bundled base model
	@:

# Beside requirements.lock in .venv, but for torch, which each GPU lock pins for its CUDA; by ===, which an installed CPU build does not meet.
setup-gpu: setup ## Install the pinned packages of the gpu extra into .venv: make setup-gpu CUDA=13 (driver 580 or newer) or CUDA=12
	@[ "$(CUDA)" = 12 ] || [ "$(CUDA)" = 13 ] || { echo "error: CUDA=$(CUDA); expected CUDA=12 or CUDA=13 (nvidia-smi shows the driver: 580 or newer takes 13)" >&2; exit 2; }
	@$(PIP) -r <(grep -v '^torch==' requirements.lock) -r requirements-gpu-cu$(CUDA).lock

prove-gpu-install: setup ## Let pip resolve both GPU locks whole, for Python 3.11 to 3.13, and the gpu extra; installs nothing (no GPU; five minutes, metadata only)
	@$(VENV)/bin/python -m tests.model.gpu_install

verify: setup ## Check the environment: packages, model, tokenizer, GPU, disk
	@$(KIT) verify $(ARGS)

train: setup ## Train LoRA adapters (outputs/checkpoints/final); NPROC=4 with four processes on this machine
	@$(if $(NPROC),$(VENV)/bin/python -m emergency_kit.training.launch $(NPROC),$(KIT)) train $(ARGS)

plan: setup ## Say what training will take before it loads anything: steps, time, memory, disk (ARGS="--gpu 16GB --fit" for a card that is not here)
	@$(KIT) plan $(ARGS)

evaluate: setup ## Answer the test split, score it beside the base model (outputs/evaluation_report.json); NPROC=4 with four processes on this machine
	@$(if $(NPROC),$(VENV)/bin/python -m emergency_kit.training.launch $(NPROC),$(KIT)) evaluate $(ARGS)

evaluate-ai: setup ## The same, with a language model as judge (ANTHROPIC_API_KEY in the environment or .env)
	@$(KIT) evaluate --ai --ai-provider anthropic $(ARGS)

evaluate-openai: setup ## The same with OpenAI (OPENAI_API_KEY)
	@$(KIT) evaluate --ai --ai-provider openai $(ARGS)

evaluate-gemini: setup ## The same with Gemini (GEMINI_API_KEY)
	@$(KIT) evaluate --ai --ai-provider gemini $(ARGS)

gate: setup ## Say whether the evaluated model may ship (outputs/verdict.json); ends with an error when not
	@$(KIT) gate $(ARGS)

infer: setup ## Ask the trained model
	@$(KIT) infer $(ARGS)

serve: setup ## Serve the trained model on this machine: a page for people, an OpenAI-compatible API for programs
	@$(KIT) serve $(ARGS)

merge: setup ## Merge the adapter into the base model (outputs/merged/final)
	@$(KIT) merge $(ARGS)

export-gguf: setup ## Write GGUF files for llama.cpp, each with its parity certificate (outputs/gguf)
	@$(KIT) export-gguf $(ARGS)

export-ollama: setup ## The same, with a Modelfile for each (outputs/gguf/ollama)
	@$(KIT) export-gguf --ollama $(ARGS)

export-lmstudio: setup ## The same, in LM Studio's folders (outputs/gguf/lmstudio)
	@$(KIT) export-gguf --lmstudio $(ARGS)

kit: setup ## Pack a folder for a USB stick that answers without a network (outputs/kit); the smallest exported file within its bounds
	@$(KIT) kit $(ARGS)

upload-hf: setup ## Upload the merged model to the Hub: make upload-hf REPO=owner/name
	@$(KIT) upload-hf --repo "$(REPO)" $(ARGS)

upload-gguf: setup ## Upload the GGUF files to the Hub: make upload-gguf REPO=owner/name
	@$(KIT) upload-gguf --repo "$(REPO)" $(ARGS)

pipeline: setup ## Train, evaluate, merge, judge; ends with an error when the verdict is not to ship
	@$(KIT) pipeline $(ARGS)

measurer: setup ## Measure the safety matcher on hand-labelled sentences and answers (evaluation/measurer/figures.yaml)
	@$(VENV)/bin/python -m emergency_kit.evaluation.measurer $(ARGS)

twins: setup ## Tell every line of every card in frames that affirm, forbid or lend it, and check how each is read
	@$(VENV)/bin/python -m emergency_kit.evaluation.twins

bench-data: setup ## Time and memory of preparing 10,000 to 1,000,000 records, beside datasets.map (half an hour, 12 GB of disk)
	@$(VENV)/bin/python benchmarks/data_scale.py 10000 30000 100000 300000 1000000

sweep: setup ## Train every combination of settings: make sweep ARGS="--set training.learning_rate=1e-3,2e-3" (outputs/sweep/sweep.md)
	@$(KIT) sweep $(ARGS)

bench-preference: setup ## DPO from the finished model, then both side by side on the test split and the red team (over an hour on 2 cores)
	@$(KIT) train --profile embedded --output-dir outputs/preference --set lora.adapter=outputs/checkpoints/final --set training.method=dpo --set dataset.max_samples=200 \
		--set training.learning_rate=2e-5 --set training.eval_steps=5 --set dataset.max_eval_samples=24 $(ARGS)
	@$(KIT) evaluate --profile embedded --output-dir outputs/preference --red-team --set evaluation.max_samples=150 --compare outputs/checkpoints/final outputs/preference/checkpoints/final

bench-training: setup ## Training speed and memory beside the original settings and TRL (an hour, 14 GB of memory; installs trl and matplotlib into .venv)
	@$(PIP) --no-build-isolation -e '.[bench]'
	@$(VENV)/bin/python benchmarks/training_speed.py --startup
	@$(VENV)/bin/python benchmarks/training_speed.py --curve outputs/bench/training_losses.svg
	@$(VENV)/bin/python benchmarks/training_speed.py --rounds 24 --contenders original,trl-float32,kit --curve outputs/bench/training_curve.svg

bench-plan: setup ## The plan's memory, time and disk beside five real short runs (a quarter of an hour on a quiet machine)
	@$(VENV)/bin/python benchmarks/plan_accuracy.py $(ARGS)

bench-gpu: setup ## Mistral-7B's shape in 4-bit on one CUDA GPU beside its peers: speed, memory, plan, resume, merge (what nine minutes hold; ARGS=--tiny tries it on a CPU)
	@$(VENV)/bin/python -m benchmarks.gpu $(ARGS)

bench-scaling: setup ## What 1 to 1,024 GPUs make of a LoRA run, on paper (ARGS="--measure 1 2 4": real runs of so many processes beside it)
	@$(VENV)/bin/python -m benchmarks.scaling $(ARGS)

# An environment of its own over .venv: trackers bring a hundred packages, some of them older than the kit's.
TRACKERS := outputs/bench/trackers
prove-trackers: setup ## TensorBoard, W&B offline, MLflow and trackio each read back after a real short run (installs them into outputs/bench/trackers, 5 minutes)
	@[ -x $(TRACKERS)/bin/python ] || $(VENV)/bin/python -m venv $(TRACKERS)
	@$(VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])' > "$$(echo $(TRACKERS)/lib/python3*/site-packages)/kit.pth"
	@$(TRACKERS)/bin/python -m pip --disable-pip-version-check install --quiet -c requirements.lock tensorboard wandb 'mlflow-skinny>=3' sqlalchemy alembic trackio
	@$(TRACKERS)/bin/python -m tests.training.trackers

# Likewise an environment of its own: DeepSpeed comes as source and brings six packages that nothing else here needs. Nothing of it is compiled.
DEEPSPEED := outputs/bench/deepspeed
prove-deepspeed: setup $(VENV)/installed-test.txt ## DeepSpeed, ZeRO 1 and 2, two processes on a CPU: gradients, losses, a stop, a killed rank, going on with another number of them (installs it into outputs/bench/deepspeed, a quarter of an hour)
	@[ -x $(DEEPSPEED)/bin/python ] || $(VENV)/bin/python -m venv $(DEEPSPEED)
	@$(VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])' > "$$(echo $(DEEPSPEED)/lib/python3*/site-packages)/kit.pth"
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(DEEPSPEED)/bin/python -m pip --disable-pip-version-check install --quiet -c requirements.lock 'deepspeed>=0.19.8,<0.20'
	@PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1 $(DEEPSPEED)/bin/python -m pytest tests/training/test_deepspeed.py $(ARGS)

bench-export: setup ## Every GGUF type of the trained model: size, time, memory, KL, top-1, safety (half an hour)
	@$(VENV)/bin/python benchmarks/export_types.py

bench-export-large: setup ## Export of a model with Mistral-7B's shapes and random weights: time and memory (half an hour, 35 GB of disk)
	@$(VENV)/bin/python benchmarks/export_large.py

bench-quantiser: setup ## Every type byte for byte against llama.cpp's own quantiser (a package of its own in outputs/bench/quantiser)
	@$(VENV)/bin/python benchmarks/export_quantiser.py

bench-inference: setup ## First token and tokens/s beside transformers generate; needs outputs/gguf/final-q4_k_m.gguf and outputs/merged/final (10 minutes)
	@$(VENV)/bin/python benchmarks/inference_speed.py $(ARGS)

bench-answers: setup ## Structure and safety of answers with and without grammar and guard, on test and red-team prompts (an hour, can be stopped and gone on with)
	@$(VENV)/bin/python benchmarks/answer_checks.py $(ARGS)

prove-structure: setup ## 1,000 answers under the grammar, each read back by the strict parser (an hour on two idle cores, two at most)
	@$(VENV)/bin/python benchmarks/structure_proof.py $(ARGS)

$(VENV)/installed-test.txt: requirements-test.lock | $(VENV)/installed.txt
	@echo "Installing what only tests need ..."
	@VENV="$(VENV)" GOAL="$(MAKECMDGOALS)" bash scripts/setup.sh also $< $@

$(VENV)/installed-dev.txt: requirements-dev.lock | $(VENV)/installed.txt
	@echo "Installing what only checks need ..."
	@VENV="$(VENV)" GOAL="$(MAKECMDGOALS)" bash scripts/setup.sh also $< $@

# Two at a time, all of them to their end; a make that can keeps the words of each together.
CHECKS := check-types check-tests check-files check-lint check-shell check-spelling
SHELL_FILES := activate_env.sh .ci/run $(wildcard scripts/*.sh recipes/*.sh benchmarks/*.sh tests/*.sh tests/*/*.sh emergency_kit/kit/texts/*.sh)
.PHONY: check $(CHECKS) notices prove-first-contact first-answer
check: $(VENV)/installed-dev.txt ## Lint, types, spelling, shell scripts, YAML and JSON, and the tests of the structure (no model, no network; pre-commit runs the same)
	@$(MAKE) --no-print-directory --keep-going --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) $(CHECKS)
	@echo "All checks passed."

check-lint: $(VENV)/installed-dev.txt
	@$(VENV)/bin/ruff check --quiet .

check-types: $(VENV)/installed-dev.txt
	@$(VENV)/bin/python -m mypy --no-error-summary

check-spelling: $(VENV)/installed-dev.txt
	@$(VENV)/bin/typos --format brief

check-shell: $(VENV)/installed-dev.txt
	@$(VENV)/bin/shellcheck $(SHELL_FILES)

FIND_FILES = find . \( -name .venv -o -name .git -o -name outputs -o -name models \) -prune -o -type f
check-files: $(VENV)/installed-dev.txt
	@$(FIND_FILES) \( -name '*.yaml' -o -name '*.yml' -o -name '*.cff' \) -print0 | xargs -0 $(VENV)/bin/python -m pre_commit_hooks.check_yaml
	@$(FIND_FILES) \( -name '*.json' -o -name '*.webmanifest' \) -print0 | xargs -0 $(VENV)/bin/python -m pre_commit_hooks.check_json
	@$(VENV)/bin/python -m pre_commit_hooks.check_toml pyproject.toml

check-tests: $(VENV)/installed-dev.txt
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/test_structure.py tests/test_notices.py tests/test_repository.py tests/model/test_locks.py -k "not quick"

notices: $(VENV)/installed.txt ## Write THIRD-PARTY-NOTICES.md anew from the installed packages
	@$(VENV)/bin/python -m emergency_kit.kit.notices > $(VENV)/notices.md && cp $(VENV)/notices.md THIRD-PARTY-NOTICES.md

first-answer: ## Time from a bare clone to the first answer, with nothing kept from before (2.5 GB of disk, about four minutes)
	@bash benchmarks/first_answer.sh

prove-first-contact: setup $(VENV)/installed-test.txt ## A whole set-up as a stranger meets it: odd path, no git, no compiler, no home, C locale, killed half way, moved, no network (two downloads, ten minutes)
	@EMERGENCY_KIT_FIRST_CONTACT=full OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -s tests/test_first_contact.py $(ARGS)

$(VENV)/installed-docs.txt: requirements-docs.lock | $(VENV)/installed.txt
	@echo "Installing what only the docs need ..."
	@VENV="$(VENV)" GOAL="$(MAKECMDGOALS)" bash scripts/setup.sh also $< $@

screenshots: setup $(VENV)/installed-test.txt ## Take the screenshots of the page in docs/images (KIT_CHECKPOINT=outputs/merged/final names another model)
	@bash tests/install_browser.sh
	@KIT_SCREENSHOTS=docs/images KIT_CHECKPOINT=$(or $(KIT_CHECKPOINT),outputs/merged/final) $(VENV)/bin/python -m pytest tests/inference/test_page.py -k screenshots

prove-kit: setup $(VENV)/installed-test.txt ## Every byte, browser (flight mode, screenshots in docs/images) and native start of outputs/kit (KIT_FOLDER names another), with no network
	@bash tests/install_browser.sh
	@$(KIT) kit --verify $(or $(KIT_FOLDER),outputs/kit)
	@KIT_FOLDER=$(or $(KIT_FOLDER),outputs/kit) KIT_SCREENSHOTS=docs/images $(VENV)/bin/python -m pytest -s tests/kit/test_browser.py tests/kit/test_computer.py -k "not damaged_wheel and not known_questions and not numbers_of and not without_wheels and not panel and not sheet"

bench-serve: setup $(VENV)/installed-test.txt ## Eight clients on a server for 30 minutes: errors, times, memory
	@$(VENV)/bin/python -m benchmarks.serve_load $(ARGS)

fuzz-serve: setup $(VENV)/installed-test.txt ## 100,000 fuzzed requests to a server
	@$(VENV)/bin/python -m benchmarks.serve_load --fuzz 100000

test: setup $(VENV)/installed-test.txt ## Run the tests
	@bash tests/install_browser.sh
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# MkDocs' makers announce a second version with every build; the pins stay with the first.
docs: $(VENV)/installed-docs.txt ## Build the documentation as a site that needs no server and no network (outputs/site/index.html)
	@$(VENV)/bin/python docs/site/stage.py outputs/docs
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet && echo "Built: outputs/site/index.html"

test-docs: setup $(VENV)/installed-test.txt ## Really run the commands of README.md and docs/, page by page, in a scratch copy with small settings, and what docs/Architecture.md adds (ARGS="-k Training" for one page; long)
	@EMERGENCY_KIT_DOCS=full OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/test_docs_commands.py tests/test_architecture.py -s $(ARGS)

test-tutorials: setup $(VENV)/installed-test.txt ## Do every tutorial to its end, from the model that make pipeline has trained (half an hour; npm and the package index for the kit)
	@EMERGENCY_KIT_TUTORIALS=full OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -s tests/test_tutorials.py $(ARGS)

prove-ranks: setup $(VENV)/installed-test.txt ## Four processes: stopped on one rank, gone on with by 1, 4 and 2; one killed; the base model whole or divided (FSDP2); streamed runs, an evaluation and a sweep of two workers disturbed likewise (20 minutes)
	@EMERGENCY_KIT_RANKS=full OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/training/test_ranks.py tests/training/test_fsdp.py tests/training/test_sweep.py tests/evaluation/test_divided.py tests/training/test_data_of_ranks.py $(ARGS)

storm: setup ## Pull the plug at least 200 times, plant faults, damage and 500,000 mutated inputs (two hours; installs wandb into .venv; some parts need root and cc)
	@$(PIP) wandb
	@EMERGENCY_KIT_STORM=full $(VENV)/bin/python -m pytest tests/storm -s $(ARGS)

clean: ## Show what would be deleted and ask; CHECKPOINTS=1 includes trained models
	@bash scripts/clean.sh $(if $(CHECKPOINTS),--checkpoints)
