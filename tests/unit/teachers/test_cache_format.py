"""The files of a teacher cache: what is written is read, in the bytes that the header states; whatever differs is refused by name."""

import hashlib
import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdtune.errors import CheckpointError, ConfigError, DataError
from kdtune.teachers.cache import (
    KINDS,
    Cache,
    Header,
    Row,
    begin,
    bytes_per_token,
    columns,
    finish,
    write_head,
    write_shard,
)
from kdtune.teachers.cache.format import lock_folder
from kdtune.teachers.cache.header import read_header

DIM, IDS, VOCAB = 6, 3, 50


def make_header(kind="topk", dtype=None, **changes):
    values = {
        "kind": kind, "dtype": dtype or KINDS[kind][0], "vocab_size": VOCAB, "dim": DIM if kind == "hidden" else None,
        "num_ids": IDS if kind in ("topk", "sampled") else None, "first_example": 10, "num_examples": 7, "dataset_size": 40,
        "examples_per_shard": 3, "max_seq_len": 16,
    }  # fmt: skip
    return Header(**values | changes)


def make_row(header, example_id):
    random = torch.Generator().manual_seed(example_id)
    num = example_id % 5  # one has no labelled position
    tokens = torch.randint(VOCAB, (num + 2,), generator=random).numpy()
    found = {}
    for name, column in columns(header).items():
        values = 10 * torch.randn((num, *column.shape), generator=random)
        found[name] = values.to(column.dtype)
    return Row(example_id, tokens, torch.arange(1, num + 1, dtype=torch.int32), found)


def write(folder, header):
    rows = {index: make_row(header, index) for index in header.example_ids}
    for number in begin(folder, header):
        write_shard(folder, header, number, [rows[index] for index in header.examples_of(number)])
    if header.kind == "hidden":
        write_head(folder, torch.arange(VOCAB * DIM, dtype=torch.float32).view(VOCAB, DIM))
    finish(folder)
    return rows


@pytest.mark.parametrize(("kind", "dtype"), [(kind, dtype) for kind, dtypes in KINDS.items() for dtype in dtypes])
def test_what_is_written_is_read(tmp_path, kind, dtype):
    header = make_header(kind, dtype, exponent=0.5 if dtype == "fp16" and kind == "sampled" else 1.0)
    rows = write(tmp_path / "cache", header)
    cache = Cache(tmp_path / "cache")
    assert cache.header == header
    for index, row in rows.items():
        found = cache.read(index, row.tokens)
        assert torch.equal(found.positions, row.positions)
        assert found.columns.keys() == row.columns.keys()
        assert all(torch.equal(found.columns[name], one) for name, one in row.columns.items())
    if kind == "hidden":
        assert cache.head.tolist() == torch.arange(VOCAB * DIM).view(VOCAB, DIM).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_takes_the_bytes_that_the_header_states(tmp_path, kind):
    header = make_header(kind)
    rows = write(tmp_path, header)
    for number in range(header.num_shards):
        file = tmp_path / f"shard-{number:05d}.safetensors"
        of_columns = struct.unpack("<Q", file.read_bytes()[:8])[0] + 8
        examples = header.examples_of(number)
        num_rows = sum(len(rows[index].positions) for index in examples)
        # Per example: index, hash, length, offset and checksum; one offset more.
        assert (
            file.stat().st_size - of_columns
            == num_rows * bytes_per_token(header) + len(examples) * (8 + 16 + 4 + 8 + 8) + 8
        )


def test_the_format_is_what_the_documentation_says(tmp_path):
    rows = write(tmp_path, make_header())
    tensors, row = load_file(tmp_path / "shard-00001.safetensors"), rows[14]
    at = tensors["example_ids"].tolist().index(14)
    start, end = tensors["offsets"][at : at + 2]
    assert tensors["positions"][start:end].tolist() == row.positions.tolist()
    assert (
        bytes(tensors["token_hashes"][at].tolist())
        == hashlib.sha256(struct.pack(f"<{len(row.tokens)}i", *row.tokens)).digest()[:16]
    )
    # positions, ids, log_tail and logp of the example, as they lie in memory
    parts = [row.positions, row.columns["ids"], row.columns["log_tail"], row.columns["logp"]]
    assert tensors["checksums"][at] == zlib.crc32(b"".join(part.numpy().tobytes() for part in parts))
    assert json.loads((tmp_path / "header.json").read_text())["first_example"] == 10


def test_a_capture_that_was_stopped_is_continued_and_refused_until_then(tmp_path):
    header = make_header()
    assert begin(tmp_path, header) == [0, 1, 2]
    write_shard(tmp_path, header, 1, [make_row(header, index) for index in header.examples_of(1)])
    (tmp_path / ".shard-00000.safetensors.partial-elsewhere-1-00000000").write_bytes(b"cut off")
    (tmp_path / ".tmpN4Dbac").write_bytes(b"")  # of safetensors
    assert begin(tmp_path, replace(header, kdtune_version="another")) == [0, 2]
    assert sorted(one.name for one in tmp_path.iterdir() if one.name.startswith(".tmp")) == []
    with pytest.raises(CheckpointError, match="2 of 3 shards are missing, such as shard-00000"):
        finish(tmp_path)
    with pytest.raises(CheckpointError, match="is not finished"):
        Cache(tmp_path)
    with pytest.raises(
        ConfigError, match=r"num_ids: 3 in the folder, 4 now\n  temperature: 1.0 in the folder, 2.0 now"
    ):
        begin(tmp_path, replace(header, num_ids=4, temperature=2.0))


def test_other_tokens_and_other_examples_are_refused_by_name(tmp_path):
    rows = write(tmp_path, make_header())
    cache, tokens = Cache(tmp_path), rows[12].tokens
    with pytest.raises(DataError, match="example 12 has other tokens in the run"):
        cache.read(12, np.concatenate([tokens[:-1], tokens[-1:] ^ 1]))
    with pytest.raises(DataError, match=r"example 12 has 3 tokens in the run, and had 4 .* tokenizer.max_seq_len=16"):
        cache.read(12, tokens[:-1])
    with pytest.raises(DataError, match="example 13 has"):
        cache.read(13, tokens)
    for index in (9, 17):
        with pytest.raises(DataError, match=f"has no example {index}; it was captured of the examples 10 to 16"):
            cache.read(index, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found(tmp_path, kind):
    rows = write(tmp_path, make_header(kind))
    file = tmp_path / "shard-00000.safetensors"
    good = file.read_bytes()
    start = struct.unpack("<Q", good[:8])[0] + 8
    lengths = json.loads(good[8:start])["lengths"]["data_offsets"]  # they stand in a message alone
    for place in range(start, len(good)):
        if start + lengths[0] <= place < start + lengths[1]:
            continue
        file.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        with pytest.raises((CheckpointError, DataError), match="shard-00000"):
            cache = Cache(tmp_path)
            for index in range(10, 13):
                cache.read(index, rows[index].tokens)


def test_damaged_files_are_refused_by_name(tmp_path):
    write(tmp_path, make_header("hidden"))
    shard, head = tmp_path / "shard-00002.safetensors", tmp_path / "head.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(
        CheckpointError,
        match=rf"shard-00002.safetensors: has {len(whole) - 1} bytes, and was written with {len(whole)}",
    ):
        Cache(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match="shard-00002.safetensors: is missing"):
        Cache(tmp_path)
    shard.write_bytes(whole)
    head.write_bytes(head.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="head.safetensors: is not the file that was written"):
        Cache(tmp_path).head  # noqa: B018


def test_a_shard_with_other_tensors_is_refused(tmp_path):
    rows = write(tmp_path, make_header())
    file = tmp_path / "shard-00000.safetensors"
    tensors = load_file(file)
    for name, wrong in (("logp", tensors["logp"].float()), ("ids", tensors["ids"][1:]), ("log_tail", None)):
        save_file(
            {**tensors, name: wrong} if wrong is not None else {key: tensors[key] for key in tensors if key != name},
            file,
        )
        index = json.loads((tmp_path / "index.json").read_text())
        index["shards"][0]["bytes"] = file.stat().st_size
        (tmp_path / "index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=f"tensor {name} must be"):
            Cache(tmp_path).read(10, rows[10].tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "logits", "dtype": "fp16"}, "kind=logits: must be one of hidden, topk, sampled, path"),
        ({"kind": "hidden", "dtype": "fp16"}, "dtype=fp16: kind=hidden keeps bf16 or int8 or fp32"),
        ({"num_ids": 0}, "num_ids=0: must be 1 or more"),
        ({"num_ids": VOCAB + 1}, "k=51: the teacher has 50 ids"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"kind": "sampled", "exponent": 1.5}, "exponent=1.5: must be above 0 and at most 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        make_header(**changes)


def test_what_is_not_a_cache_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="is not a teacher cache: it has no header.json"):
        Cache(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty and holds no teacher cache"):
        begin(tmp_path, make_header())
    values = make_header().described()
    for change, message in (
        ({"format": 2}, "format is 2"),
        ({"colour": 1}, "unknown keys: colour"),
        ({"num_ids": None}, "num_ids=None"),
    ):
        Path(tmp_path / "header.json").write_text(json.dumps(values | change))
        with pytest.raises(CheckpointError, match=message):
            Cache(tmp_path)


def test_a_header_without_shards_gives_way_to_another(tmp_path):
    begin(tmp_path, make_header(num_ids=4))
    assert begin(tmp_path, make_header(num_ids=3)) == [0, 1, 2] and read_header(tmp_path).num_ids == 3


def test_damaged_numbers_are_captured_again(tmp_path):
    header = make_header("hidden")
    rows = write(tmp_path, header)
    shard, head = tmp_path / "shard-00001.safetensors", tmp_path / "head.safetensors"
    good, good_head = shard.read_bytes(), head.read_bytes()
    start = struct.unpack("<Q", good[:8])[0] + 8
    place = start + json.loads(good[8:start])["hidden"]["data_offsets"][0]
    shard.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    assert begin(tmp_path, header) == [1]
    write_shard(tmp_path, header, 1, [rows[index] for index in header.examples_of(1)])
    head.write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match=r"head.safetensors: is missing or cut off"):
        Cache(tmp_path)
    write_head(tmp_path, torch.arange(VOCAB * DIM, dtype=torch.float32).view(VOCAB, DIM))
    assert shard.read_bytes() == good and head.read_bytes() == good_head


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("index.json", "{}", "does not list the shards"),
        ("index.json", '{"shards": [1]}', "does not list the shards"),
        ("header.json", None, "weight is .50, 6., and header.json says .49, 6."),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(tmp_path, name, text, message):
    header = make_header("hidden")
    write(tmp_path, header)
    (tmp_path / name).write_text(json.dumps(header.described() | {"vocab_size": 49}) if text is None else text)
    with pytest.raises(CheckpointError, match=message):
        Cache(tmp_path)


def test_an_example_that_was_cut_is_told_from_another_text(tmp_path):
    header = make_header(max_seq_len=4)  # example 12 has as many
    rows = write(tmp_path, header)
    with pytest.raises(
        DataError, match=r"example 12 has 3 tokens in the run, and was cut at tokenizer.max_seq_len=4 .*ALM"
    ):
        Cache(tmp_path).read(12, rows[12].tokens[:-1])


def test_a_capture_that_was_killed_at_its_header_begins_again(tmp_path):
    (tmp_path / ".header.json.partial-elsewhere-1-00000000").write_text("{")
    os.utime(tmp_path / ".header.json.partial-elsewhere-1-00000000", (0, 0))
    assert begin(lock_folder(tmp_path), make_header()) == [0, 1, 2]
    other = tmp_path / "mine"
    other.mkdir()
    (other / ".tmp123456").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no teacher cache"):
        begin(other, make_header())
    assert (other / ".tmp123456").read_text() == "mine"
