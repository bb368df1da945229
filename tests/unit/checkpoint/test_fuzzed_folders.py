"""A model folder with one value of one of its files changed to something else: it works, or one message says why not."""

import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import tiny_model

from kdtune import tokenizers
from kdtune.checkpoint import Checkpointer, save_model
from kdtune.errors import CheckpointError, KDTuneError
from kdtune.generation import generate
from kdtune.models import llama
from kdtune.tokenizers import byte_tokenizer

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
VALUES = [
    None, True, False, -1, 0, 1, 3, 10**9, 2**63, 10**30, 1.5, 1e-40, 1e308, float("nan"), float("inf"), "", "x", "5",
    "\ud83d", "\0", "a" * 100_000, [], [1], ["a"], [None], {}, {"a": 1}, {"content": None}, {"content": "<s>"}, [[[]]],
]  # fmt: skip


def places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value in a JSON document; of long lists and objects the first few."""
    items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())[:25]
    return [place for key, value in items for place in [(*at, key), *places(value, (*at, key))]]


def changed(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    document = copy.deepcopy(document)
    node = document
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return document


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzed") / "model"
    torch.manual_seed(0)
    model = llama(vocab_size=320, embed_dim=8, num_layers=1, num_heads=2, intermediate_dim=8, max_seq_len=64)
    save_model(model, folder, tokenizer=byte_tokenizer())
    return folder


def use(folder: Path) -> None:
    checkpointer = Checkpointer(folder)
    if problems := checkpointer.problems():
        raise CheckpointError("\n".join(problems))
    tokenizer = tokenizers.load(folder)
    ids, _ = tokenizer.tokenize_messages([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    model = checkpointer.load()
    tokenizers.check_vocabulary(tokenizer, model.config.vocab_size)
    tokenizer.decode(generate(model, ids, max_new_tokens=2, stop_ids=tokenizer.stop_ids))


@pytest.mark.parametrize("name", FILES)
def test_a_changed_value(model_folder: Path, name: str) -> None:
    generator, file = random.Random(name), model_folder / name
    whole = file.read_text(encoding="utf-8")
    document, told = json.loads(whole), 0
    everywhere = places(document)
    for _ in range(60):
        place, value = generator.choice(everywhere), generator.choice(VALUES)
        file.write_text(json.dumps(changed(document, place, value)))
        start = time.monotonic()
        try:
            use(model_folder)
        except KDTuneError as error:
            told += 1
            assert len(str(error)) < 1500, (place, str(value)[:40], str(error)[:300])
        finally:
            file.write_text(whole, encoding="utf-8")
        assert time.monotonic() - start < 10, (place, str(value)[:40])
    assert told > 3 or name == "tokenizer_config.json"  # most of which only transformers reads
    use(model_folder)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("tokenizer_config.json", ("eos_token",), "a" * 100_000, "(100000 characters) is none"),
        ("tokenizer_config.json", ("eos_token",), "\ud83d", "well-formed text expected"),
        ("tokenizer_config.json", ("added_tokens_decoder",), 5, "the added token 5 with the id None"),
        ("tokenizer_config.json", ("added_tokens_decoder",), {"a": {"content": "<x>"}}, "each an AddedToken object"),
        ("tokenizer_config.json", ("added_tokens_decoder",), {"9": {"content": 5}}, "each an AddedToken object"),
        ("tokenizer_config.json", ("added_tokens_decoder",), {"9": {"content": "x" * 2000}}, "(2000 characters) is none"),
        ("tokenizer.json", ("model", "vocab", "a"), 10**9, "the largest id is 1000000000; at most 16777216 expected"),
        ("tokenizer.json", ("added_tokens", 0), True, "the tokenizers library cannot read it"),
    ],
)  # fmt: skip
def test_tokenizer_files_that_hold_none(
    model_folder: Path, name: str, place: tuple[Any, ...], value: Any, message: str
) -> None:
    file = model_folder / name
    whole = file.read_text(encoding="utf-8")
    file.write_text(json.dumps(changed(json.loads(whole), place, value)))
    try:
        with pytest.raises(CheckpointError) as caught:
            use(model_folder)
    finally:
        file.write_text(whole, encoding="utf-8")
    assert str(model_folder) in str(caught.value) and message in str(caught.value)


def test_the_sample_is_a_model(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "model", tokenizer=byte_tokenizer())
    assert {path.name for path in (tmp_path / "model").iterdir()} >= set(FILES)
