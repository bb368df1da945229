"""Packs of examples: what is in each, by hand, and that resumed and streamed epochs are the same."""

from itertools import chain, islice

import numpy as np
import pytest
from datasets import IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from kdtune.constants import IGNORE_INDEX
from kdtune.data import (
    DatasetStats,
    EncodedRow,
    Loader,
    RowStream,
    TokenizedDataset,
    alpaca_dataset,
    collate,
    mixed_dataset,
    pack_examples,
    quickstart_dataset,
    text_completion_dataset,
)
from kdtune.data.packing import cut_into_packs
from kdtune.data.rows import RowEncoder
from kdtune.errors import ConfigError
from kdtune.tokenizers import byte_tokenizer

LENGTHS = [4, 3, 5, 2, 6, 1 + 1, 3]


def row(number):
    return EncodedRow([10 * number + position for position in range(LENGTHS[number])], [True] * LENGTHS[number])


def in_memory():
    return TokenizedDataset((row(number) for number in range(len(LENGTHS))), DatasetStats("rows", len(LENGTHS)))


def stream():
    rows = IterableDataset.from_generator(lambda: ({"number": number} for number in range(len(LENGTHS))))
    return RowStream(rows, RowEncoder(lambda found: row(found["number"])), source="stream", shuffle_buffer=3)


def packed(dataset, size=8, **settings):
    return pack_examples(dataset, byte_tokenizer(max_seq_len=size), **settings)


def read(dataset, **order):
    return list(dataset.examples(**{"seed": 0, "epoch": 0, "shuffle": False, **order}))


def lengths(packs):
    return [[len(one.tokens) for one in pack.documents] for pack in packs]


@pytest.mark.parametrize("dataset", [in_memory, stream])
def test_packs_take_the_next_examples_that_fit(dataset):
    found = packed(dataset())
    packs = read(found)
    assert lengths(packs) == [[4, 3], [5, 2], [6, 2], [3]]
    assert packs[0].tokens.tolist() == [0, 1, 2, 3, 10, 11, 12]
    assert packs[0].labels.tolist() == [1, 2, 3, IGNORE_INDEX, 11, 12, IGNORE_INDEX]
    batch = collate(packs[:2], 0)
    assert batch.lengths == (4, 3, 5, 2) and batch.tokens.shape == (4, 5), (
        "each document is a row, where rows are padded"
    )
    assert batch.without_padding().inputs["documents"].lengths == (4, 3, 5, 2)
    assert found.report.examples == len(LENGTHS) and not found.is_chat


@pytest.mark.parametrize("dataset", [in_memory, stream])
def test_split_packs_are_full_and_lose_no_label(dataset):
    packs = read(packed(dataset(), split_across_pack=True))
    assert lengths(packs) == [[4, 3, 1], [4, 2, 2], [4, 2, 2], [1]]
    assert packs[0].tokens.tolist() == [0, 1, 2, 3, 10, 11, 12, 20]
    assert packs[0].labels.tolist()[-1] == 21, "the next token, which begins the next pack"
    whole, cut = (np.concatenate([one.labels for one in examples]) for examples in (read(in_memory()), packs))
    assert np.array_equal(whole, cut)


def test_lengths_indices_and_fingerprints():
    whole, split = packed(in_memory()), packed(in_memory(), split_across_pack=True)
    assert whole.lengths == [7, 7, 8, 3] == [len(one.tokens) for one in read(whole)]
    assert collate(read(whole)[:2], 0).example_ids == (0, 1, 2, 3) and collate(read(split)[:2], 0).example_ids is None
    prints = {one.fingerprint() for one in (whole, split, packed(in_memory(), 9), in_memory())}
    assert len(prints) == 4 and whole.fingerprint() == packed(in_memory()).fingerprint()
    with pytest.raises(IndexError, match="pack 4 of 4"):
        whole[4]


@given(st.lists(st.integers(1, 12), max_size=20), st.integers(1, 12), st.booleans())
def test_packs_hold_everything_once_in_order(sizes, limit, split):
    packs = list(cut_into_packs(range(len(sizes)), sizes.__getitem__, limit, split=split))
    tokens = [(item, at) for pack in packs for item, start, stop in pack for at in range(start, stop)]
    assert tokens == [(item, at) for item, size in enumerate(sizes) for at in range(size)]
    totals = [sum(stop - start for _, start, stop in pack) for pack in packs]
    assert all(total <= limit or len(pack) == 1 for total, pack in zip(totals, packs, strict=True))
    if split:
        assert all(total == limit for total in totals[:-1])
    else:
        assert all(start == 0 and stop == sizes[item] for item, start, stop in chain.from_iterable(packs))
        assert all(total + sizes[after[0][0]] > limit for total, after in zip(totals, packs[1:], strict=False))


@pytest.mark.parametrize(("dataset", "num_workers"), [(in_memory, 0), (in_memory, 2), (stream, 0), (stream, 1)])
@pytest.mark.parametrize("split", [False, True])
def test_epochs_resume_at_any_pack(dataset, num_workers, split):
    def loader(**settings):
        return Loader(
            packed(dataset(), split_across_pack=split), batch_size=1, pad_id=0, seed=2, padding_free=True, **settings
        )

    def taken(loader, count):
        return [(batch.tokens.tolist(), batch.lengths, loader.position) for batch in islice(loader, count)]

    whole = taken(loader(), 9)
    assert whole[0] not in whole[1:]
    for done in (1, 4, 6):
        again = loader(num_workers=num_workers)
        again.seek(whole[done - 1][2])
        assert taken(again, 9 - done) == whole[done:]


def test_builders_pack(tmp_path):
    tokenizer, file = byte_tokenizer(max_seq_len=400), tmp_path / "rows.jsonl"
    file.write_text('{"text": "abc", "instruction": "a", "input": "", "output": "b"}\n' * 6)
    for build in (text_completion_dataset, alpaca_dataset):
        one, many = build(tokenizer, source=str(file)), build(tokenizer, source=str(file), packed=True)
        assert sum(one.lengths) == sum(many.lengths) and len(many) < len(one) and many.is_chat == one.is_chat
        streamed = build(tokenizer, source=str(file), packed=True, streaming=True)
        assert lengths(read(streamed)) == lengths(read(many))
    parts = [
        quickstart_dataset(tokenizer, split=split, packed=True, split_across_pack=True)
        for split in ("train[:4]", "test[:4]")
    ]
    assert {len(one.tokens) for one in read(mixed_dataset(tokenizer, datasets=parts, weights=[1, 1]))} >= {400}


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"split_across_pack=true: examples are not packed"):
        pack_examples(in_memory(), byte_tokenizer(max_seq_len=8), packed=False, split_across_pack=True)
    with pytest.raises(
        ConfigError, match=r"packed=true: a pack has up to tokenizer.max_seq_len tokens, which is not set"
    ):
        pack_examples(in_memory(), byte_tokenizer())
    paired = in_memory()
    paired.is_paired = True
    with pytest.raises(ConfigError, match="packed=true: a teacher with another tokenizer"):
        packed(paired)
