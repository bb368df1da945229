import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdtune.errors import ConfigError, DataError
from kdtune.evaluation import InstructionSet, evaluate_rouge, rouge_l
from kdtune.models import llama
from kdtune.tokenizers import byte_tokenizer

# Of up to three letters, so that nothing is stemmed.
WORDS = st.lists(st.sampled_from(["sun", "sea", "oak", "fog", "7"]), min_size=1, max_size=7)


def brute_force(answer, reference):
    """F1 of the longest common subsequence, found by trying every subsequence of the answer."""
    longest = 0
    for size in range(len(answer) + 1):
        for chosen in itertools.combinations(answer, size):
            rest = iter(reference)
            if all(word in rest for word in chosen):
                longest = max(longest, size)
    if longest == 0:
        return 0.0
    precision, recall = longest / len(answer), longest / len(reference)
    return 100 * 2 * precision * recall / (precision + recall)


@given(WORDS, WORDS)
def test_as_brute_force(answer, reference):
    assert rouge_l(" ".join(answer), [" ".join(reference)]) == pytest.approx(brute_force(answer, reference))


def test_words_are_lower_cased_stemmed_and_stripped_of_punctuation():
    assert rouge_l("The dogs were RUNNING!", ["the dog, were runs"]) == 100.0
    assert rouge_l("", ["something"]) == 0.0
    assert rouge_l("red sky", ["blue sea", "red sky at night"]) == pytest.approx(100 * 2 * 1 * 0.5 / 1.5)


ROWS = [
    {"instruction": "Name a tree.", "input": "", "output": "An oak"},
    {"instruction": "Add the numbers.", "input": "1 2", "output": ["3", "three"]},
    {"instruction": "Say hello.", "input": None, "output": "hello"},
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return llama(
        vocab_size=260, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_dim=24, max_seq_len=256
    )


def test_the_published_prompt(source):
    first, second, third = InstructionSet(name="own", source=source).read()
    assert first.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a tree.\n\n### Response:\n"
    )
    assert second.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert second.references == ("3", "three") and third.references == ("hello",)
    plain = InstructionSet(name="own", source=source, prompt="plain", num_examples=2).read()
    assert [one.prompt for one in plain] == ["Name a tree.", "Add the numbers.\n\n1 2"]


def test_prompt_as_it_is_or_as_a_chat(source):
    tokenizer = byte_tokenizer()
    for chat in (False, True):
        one = InstructionSet(name="own", source=source, apply_chat_template=chat)
        text = tokenizer.decode(one.prompt_ids(tokenizer, one.read()[0]), skip_special=False)
        assert text.startswith("<|im_start|>user\n" if chat else "Below is")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_the_batches(model, source, temperature):
    seeds = [10, 20] if temperature else [0]
    one = InstructionSet(name="own", source=source, max_new_tokens=9, temperature=temperature, seeds=seeds)
    runs = [
        evaluate_rouge(model, byte_tokenizer(), one, one.read(), max_length=256, batch_size=size) for size in (1, 3)
    ]
    assert runs[0] == runs[1]
    records = runs[0].records
    assert len(records) == 3 * len(seeds) and runs[0].truncated == 0
    scores = [record["rouge_l"] for record in records]
    assert runs[0].mean == pytest.approx(sum(scores) / len(scores))
    assert math.isfinite(runs[0].stderr)
    if temperature:
        assert {r["answer"] for r in records if r["seed"] == 10} != {r["answer"] for r in records if r["seed"] == 20}


def test_the_standard_error_is_that_of_the_instructions_means(model, source, monkeypatch):
    by_seed = np.array([[0.0, 30.0, 90.0], [10.0, 70.0, 50.0]])
    scores = iter(by_seed.flatten().tolist())
    monkeypatch.setattr("kdtune.evaluation.rouge.rouge_l", lambda answer, references: next(scores))
    one = InstructionSet(name="own", source=source, max_new_tokens=1, temperature=1.0, seeds=[10, 20])
    found = evaluate_rouge(model, byte_tokenizer(), one, one.read(), max_length=256)
    assert found.mean == pytest.approx(by_seed.mean())
    assert found.stderr == pytest.approx(stats.sem(by_seed.mean(0)))


def test_long_prompts_are_cut_and_counted(model, source):
    one = InstructionSet(name="own", source=source, max_new_tokens=4)
    assert evaluate_rouge(model, byte_tokenizer(), one, one.read(), max_length=200).truncated == 1
    with pytest.raises(ConfigError, match=r"rouge\.own\.max_new_tokens=4: leaves no room.*max_seq_length=4"):
        evaluate_rouge(model, byte_tokenizer(), one, one.read(), max_length=4)


def test_bad_input(source, tmp_path):
    with pytest.raises(ConfigError, match="seeds"):
        InstructionSet(name="own", source=source, seeds=[1, 2])
    with pytest.raises(ConfigError, match=r"rouge\.own\.num_examples=0"):
        InstructionSet(name="own", source=source, num_examples=0)
    with pytest.raises(ConfigError, match="answer"):
        InstructionSet(name="own", source=source, column_map={"answer": "output"})
    with pytest.raises(DataError, match="row 1: column 'reply' is missing"):
        InstructionSet(name="own", source=source, column_map={"output": "reply"}).read()
    with pytest.raises(DataError, match="unknown split 'test'"):
        InstructionSet(name="own", source=source, split="test").read()
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        InstructionSet(name="own", source=str(tmp_path / "none.jsonl")).read()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, r"rouge\.own\.temperature=-1\.0: must be 0"),
        ({"top_k": 0}, r"rouge\.own\.top_k=0: must be 1"),
        ({"top_p": 1.5}, r"rouge\.own\.top_p=1\.5: must be above 0"),
        ({"max_new_tokens": 0}, r"rouge\.own\.max_new_tokens=0: must be 1"),
        ({"name": "a/b"}, r"rouge\.name='a/b': letters, digits"),
        ({"name": ""}, r"rouge\.name='': letters, digits"),
        ({"name": "own_stderr"}, r"rouge\.name='own_stderr'.*not ending in _stderr"),
    ],
)
def test_settings_are_refused_before_anything_is_read(setting, message):
    with pytest.raises(ConfigError, match=message):
        InstructionSet(**{"name": "own", "source": "/nowhere", **setting})
