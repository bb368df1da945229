"""Greedy generation against transformers' on the real SmolLM2, token for token; samples against each other, bit for bit.

KDTUNE_TEST_FULL=1 takes 20 prompts of 128 new tokens in place of 4 of 32.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from kdtune.checkpoint import load_model, save_model
from kdtune.generation import Completion, Sampling, complete, generate, generate_batch
from kdtune.tokenizers import load

transformers = pytest.importorskip("transformers")

IS_FULL = bool(os.environ.get("KDTUNE_TEST_FULL"))
NUM_PROMPTS, NUM_NEW = (20, 128) if IS_FULL else (4, 32)
QUESTIONS = [
    "What is the capital of Norway?",
    "Explain in one sentence why leaves turn yellow in autumn, so that a child of eight understands it.",
    "Write a haiku about a lighthouse.",
    "List five uses for an old newspaper.",
    "How do I boil an egg?",
    "Translate 'good morning' to French, German and Spanish.",
    "What is 17 times 23? Show each step.",
    "Give me a name for a black cat, and say why you chose it.",
    "Summarize the plot of Romeo and Juliet in two sentences.",
    "Write a Python function that reverses a string.",
    "Who wrote 'The Origin of Species', and when was it published?",
    "What is the difference between weather and climate?",
    "Make a short shopping list for a vegetable soup.",
    "Rewrite politely: 'Send me the report now.'",
    "What do bees do in winter?",
    "Name three rivers in Africa and the countries they flow through.",
    "Why is the sea salty?",
    "Tell me a joke about a programmer and a duck.",
    "Describe the taste of a lemon without using the word 'sour'.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
]

pytestmark = [pytest.mark.real, pytest.mark.slow("a real model on 4 prompts; test_models.py generates with a tiny one")]


@pytest.fixture(scope="module")
def model(smollm2_gguf):
    return load_model(smollm2_gguf, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(smollm2_gguf) -> list[list[int]]:
    tokenizer = load(smollm2_gguf)
    assert len(QUESTIONS) == 20
    return [
        tokenizer.tokenize_messages([{"role": "user", "content": question}], add_generation_prompt=True)[0]
        for question in QUESTIONS[:NUM_PROMPTS]
    ]


@pytest.fixture(scope="module")
def alone(model, prompts) -> list[list[int]]:
    return [generate(model, prompt, max_new_tokens=NUM_NEW, stop_ids=()) for prompt in prompts]


def test_token_for_token_as_transformers(model, prompts, alone, tmp_path):
    save_model(model, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    for prompt, new_ids in zip(prompts, alone, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert new_ids == expected[0, len(prompt) :].tolist()
        assert len(new_ids) == NUM_NEW


def test_a_batch_of_all_gives_the_same(model, prompts, alone):
    assert len({len(prompt) for prompt in prompts}) > 2
    assert generate_batch(model, prompts, max_new_tokens=NUM_NEW, stop_ids=()) == alone


def sampled(folder: Path, part: slice, slots: int) -> list[Completion]:
    """Samples of some of the prompts, in a process of its own or in this one."""
    torch.set_num_threads(1)
    tokenizer = load(folder)
    prompts = [
        tokenizer.tokenize_messages([{"role": "user", "content": question}], add_generation_prompt=True)[0]
        for question in QUESTIONS[:5]
    ]
    return complete(
        load_model(folder, dtype=torch.float32), prompts[part], max_new_tokens=16, stop_ids=tokenizer.stop_ids,
        sampling=Sampling(1.0), seeds=range(5)[part], slots=slots, with_log_probs=True,
    )  # fmt: skip


def test_samples_are_the_same_to_the_bit_in_any_company(smollm2_gguf):
    """With 1, 8 and 32 slots, and shared by two processes."""
    together = sampled(smollm2_gguf, slice(None), 32)
    for slots in (1, 8):
        assert sampled(smollm2_gguf, slice(None), slots) == together
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        shares = list(pool.map(sampled, [smollm2_gguf] * 2, [slice(0, None, 2), slice(1, None, 2)], [2, 32]))
    assert [shares[number % 2][number // 2] for number in range(5)] == together
