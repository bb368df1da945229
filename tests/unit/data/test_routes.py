"""The column that chooses the teacher of a row: read with the rows, kept with their tokens, and carried into the batches."""

from pathlib import Path
from typing import Any

import pytest

from kdtune import tokenizers
from kdtune.data import Loader, batches, instruct_dataset, load_dataset, pack_examples, tokenized_cache
from kdtune.errors import DataError

# Every third row is too long, and left out.
ROWS = [
    {
        "input": "A question? " * (1 if number % 3 else 30),
        "output": f"Yes, {number}.",
        "subject": ("math", "code")[number % 2],
    }
    for number in range(12)
]
ROUTES = [row["subject"] for number, row in enumerate(ROWS) if number % 3]


def built(source: str, **settings: Any) -> Any:
    return instruct_dataset(
        tokenizers.byte_tokenizer(max_seq_len=200), source=source, route_column="subject", **settings
    )


def test_an_example_has_the_value_of_its_row(jsonl) -> None:
    dataset = built(jsonl(ROWS))
    assert [dataset[index].route for index in range(len(dataset))] == ROUTES and len(ROUTES) == 8
    assert not dataset.report.notes()
    loader = Loader(dataset, batch_size=3, pad_id=0, seed=1, padding_free=True)
    while loader.position[0] < 1:
        batch = next(loader)
        assert batch.routes == tuple(ROUTES[index] for index in batch.example_ids)
    packs = pack_examples(dataset, tokenizers.byte_tokenizer(max_seq_len=200))
    assert [route for batch in batches(packs, 2, 0, padding_free=True) for route in batch.routes] == ROUTES
    stream = built(jsonl(ROWS, "stream.jsonl"), streaming=True)
    assert [one.route for one in stream.examples(seed=0, epoch=0, shuffle=False)] == ROUTES


def test_its_values_are_part_of_the_fingerprint_and_not_of_the_tokens(jsonl) -> None:
    plain = instruct_dataset(tokenizers.byte_tokenizer(max_seq_len=200), source=jsonl(ROWS))
    other = built(jsonl([{**row, "subject": "math"} for row in ROWS], "other.jsonl"))
    prints = [one.fingerprint() for one in (plain, built(jsonl(ROWS)), other)]
    assert len(set(prints)) == 3 and len({text.partition(", routes ")[0] for text in prints}) == 1
    assert plain[0].route is None and next(iter(batches(plain, 2, 0))).routes is None


def test_kept_tokens_have_it_too(jsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized_cache, "FEWEST_ROWS", 1)
    node = {"_component_": "kdtune.data.instruct_dataset", "source": jsonl(ROWS), "route_column": "subject"}
    first, second = (
        load_dataset("dataset", node, tokenizers.byte_tokenizer(max_seq_len=200), cache_dir=tmp_path / "kept")
        for _ in range(2)
    )
    assert list((tmp_path / "kept").iterdir()) and second.routes == first.routes == ROUTES


@pytest.mark.parametrize("wrong", [{"subject": None}, {}])
def test_a_row_without_a_value_is_refused(jsonl, wrong: dict[str, Any]) -> None:
    rows = [*ROWS[1:4], {"input": "A?", "output": "B.", **wrong}]
    with pytest.raises(DataError, match="row 4: column 'subject' has no value; it is the route_column"):
        built(jsonl(rows))
