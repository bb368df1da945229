"""lm-eval's own `hf` backend on the same weights is the witness: every document's answer and every metric."""

from pathlib import Path

import pytest
import torch
from evaluation_tasks import FILES, write_tasks
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kdtune import tokenizers
from kdtune.checkpoint import load_model, save_model
from kdtune.evaluation import evaluate_tasks, flat_metrics, load_tasks
from kdtune.models import llama

TASKS = [f"own_{name}" for name in FILES]
# All tasks are given as objects: lm-eval need not read its own 14,000 files.
NO_OTHERS = TaskManager(include_defaults=False)


def both(folder, checkpoint, tasks, num_documents, *, max_length=None, **settings):
    """Results of ours (from `checkpoint`) and of the hf backend (from `folder`), with their samples."""
    own_tasks = write_tasks(Path(folder).parent / "tasks", num_documents)
    ours = evaluate_tasks(
        load_model(checkpoint, dtype=torch.float32), tokenizers.load(checkpoint), load_tasks(tasks, str(own_tasks)),
        batch_size=2, max_length=max_length, log_samples=True, **settings,
    )  # fmt: skip
    theirs = simple_evaluate(
        HFLM(pretrained=str(folder), dtype="float32", batch_size=4, device="cpu", max_length=max_length),
        tasks=load_tasks(tasks, str(own_tasks)), task_manager=NO_OTHERS, log_samples=True, bootstrap_iters=0, **settings,
    )  # fmt: skip
    return ours, theirs


def assert_equal(ours, theirs, tolerance):
    assert set(ours["samples"]) == set(theirs["samples"])
    for task, mine in ours["samples"].items():
        for a, b in zip(mine, theirs["samples"][task], strict=True):
            assert a["arguments"] == b["arguments"]
            for x, y in zip(flat(a["resps"]), flat(b["resps"]), strict=True):
                assert x == y if isinstance(x, str | bool) else abs(x - y) < tolerance, (task, a["doc_id"], x, y)
    expected = flat_metrics(theirs)
    found = {name: value for name, value in flat_metrics(ours).items() if "_stderr" not in name}
    # A perplexity carries the rounding of its log-likelihoods; what is counted is equal.
    rel = {name: 1e-4 if "perplexity" in name or "bits" in name else 0.0 for name in found}
    assert all(found[name] == pytest.approx(expected[name], rel=rel[name], abs=0.0) for name in found)


def flat(value):
    return [item for part in value for item in flat(part)] if isinstance(value, list | tuple) else [value]


def random_folder(folder, tokenizer):
    torch.manual_seed(0)
    model = llama(
        vocab_size=max(320, tokenizer.vocab_size), embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2,
        intermediate_dim=64, max_seq_len=512, tie_embeddings=True,
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    save_model(model, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama with a tokenizer that puts no bos before a text."""
    return random_folder(tmp_path_factory.mktemp("random") / "model", tokenizers.byte_tokenizer())


def test_every_kind_of_request(folder):
    assert_equal(*both(folder, folder, TASKS, 12), tolerance=1e-3)


def test_texts_longer_than_the_model_reads(folder):
    """Contexts are cut on the left, and whole texts go through in windows."""
    assert_equal(*both(folder, folder, ["own_endings", "own_texts"], 6, max_length=36), tolerance=1e-3)


def test_few_shot_examples_are_the_same(folder):
    own_tasks = write_tasks(Path(folder).parent / "tasks", 6)
    ours = evaluate_tasks(load_model(folder), tokenizers.load(folder), load_tasks(["own_letters"], str(own_tasks), num_fewshot=2),
                          num_fewshot=2, seed=1234, log_samples=True)  # fmt: skip
    theirs = simple_evaluate(HFLM(pretrained=str(folder), dtype="float32", device="cpu"), num_fewshot=2, bootstrap_iters=0,
                             tasks=load_tasks(["own_letters"], str(own_tasks), num_fewshot=2), task_manager=NO_OTHERS)  # fmt: skip
    assert_equal(ours, theirs, tolerance=1e-3)


def test_chat_template(folder):
    tasks = ["own_endings", "own_answers"]
    assert_equal(*both(folder, folder, tasks, 6, apply_chat_template=True), tolerance=1e-3)


@pytest.mark.real
def test_a_tokenizer_that_puts_bos_before_a_text(llama3_tokenizer_file, tmp_path):
    folder = random_folder(tmp_path / "model", tokenizers.load(llama3_tokenizer_file))
    assert tokenizers.load(folder).begins_with_bos
    assert_equal(*both(folder, folder, ["own_endings", "own_texts"], 3), tolerance=1e-3)
    assert_equal(*both(folder, folder, ["own_answers"], 2, apply_chat_template=True), tolerance=1e-3)


@pytest.mark.real
@pytest.mark.slow("a real model on 30 documents; tiny ones get every kind of request")
def test_a_real_model_on_thirty_documents(smollm2_gguf, tmp_path):
    """Ours reads the GGUF, theirs the Hugging Face folder that we make of it."""
    folder = tmp_path / "model"
    save_model(load_model(smollm2_gguf), folder, base=smollm2_gguf, tokenizer=tokenizers.load(smollm2_gguf))
    tasks = ["own_endings", "own_letters", "own_texts"]
    assert_equal(*both(folder, smollm2_gguf, tasks, 30), tolerance=1e-3)
    assert_equal(*both(folder, smollm2_gguf, ["own_answers"], 3), tolerance=1e-3)
