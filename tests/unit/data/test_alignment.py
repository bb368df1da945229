"""Two tokenizations of one text, aligned by bytes: what belongs together is worked out by hand."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from kdtune.data import (
    DatasetStats,
    TokenizedDataset,
    TokenizerPair,
    alpaca_dataset,
    collate,
    load_dataset,
    mixed_dataset,
    quickstart_dataset,
)
from kdtune.data.loader import Loader
from kdtune.data.transforms import EncodedRow, make_example, truncated
from kdtune.errors import ConfigError
from kdtune.tokenizers import GGUFTokenizer, byte_tokenizer
from kdtune.tokenizers.bpe import sentencepiece_bpe, tokenizer_from_ranks
from kdtune.tokenizers.chat_format import CHATML, LLAMA2


def byte_level(*tokens: bytes) -> GGUFTokenizer:
    """GPT-2's kind: bytes and the given merges, ChatML."""
    ranks = {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(tokens)}
    backend = tokenizer_from_ranks(ranks, r" ?\p{L}+|[^\p{L}]")
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return GGUFTokenizer(backend, named=named, model_max_length=None, chat_template=CHATML, origin="byte_level")


def sentencepiece(*words: str) -> GGUFTokenizer:
    """Llama 2's kind: a space before a text, byte pieces, its chat template with blanks around an answer."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    letters = [chr(i) for i in range(33, 127)] + ["▁"]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *letters, *words]
    backend = sentencepiece_bpe(tokens, [-float(i) for i in range(len(tokens))], unknown="<unk>", prefix=True)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return GGUFTokenizer(backend, named=named, model_max_length=None, chat_template=LLAMA2, origin="sentencepiece")


def chat(answer: str, question: str = "Q") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def chunks(student: Any, teacher: Any, answer: str, **options: Any) -> list[tuple[bytes, bytes, int]]:
    """The bytes of each chunk in both models' tokens, and whether they are the same; a special token is \\xff."""
    pair = TokenizerPair(student, teacher)
    messages = chat(answer)
    ids, trained = pair.tokenize_messages(messages, **options)
    found = pair.pair_messages(ids, trained, messages)
    ours, theirs = pair._streams
    return [
        (ours.spell(ids[a + 1 : b + 1]), theirs.spell(found.tokens[c + 1 : d + 1].tolist()), exact)
        for a, b, c, d, exact in found.chunks_K5.tolist()
    ]


def test_chunks_end_where_both_have_a_boundary() -> None:
    student, teacher = byte_level(b"the", b" cat"), byte_level(b" ca")
    assert chunks(student, teacher, "the cat") == [
        (b"the", b"the", 1), (b" cat", b" cat", 1), (b"\xff", b"\xff", 1),
    ]  # fmt: skip
    assert chunks(student, byte_tokenizer(), "the") == [(b"the", b"the", 1), (b"\xff", b"\xff", 1)]


def test_a_character_may_be_cut_anywhere() -> None:
    euro = "€".encode()
    student, teacher = byte_level(euro[:2]), byte_level(euro[1:])
    found = chunks(student, teacher, "€a")
    assert found == [(euro, euro, 1), (b"a", b"a", 1), (b"\xff", b"\xff", 1)]
    assert chunks(byte_level(euro[:2]), byte_tokenizer(), "€")[0] == (euro[:2], euro[:2], 1)


def test_a_blank_of_the_template_is_not_the_texts() -> None:
    student = sentencepiece("▁a", "ab", "▁ab")
    found = chunks(student, byte_level(b"ab"), "ab c")
    assert found == [
        (b" ab", b"ab", 0), (b" ", b" ", 1), (b"c", b"c", 1), (b" \xff", b"\xff", 0),
    ]  # fmt: skip


def test_one_token_is_an_answer() -> None:
    assert chunks(byte_tokenizer(), byte_level(), "a") == [(b"a", b"a", 1), (b"\xff", b"\xff", 1)]


def test_contents_are_aligned_not_templates() -> None:
    found = chunks(sentencepiece(), byte_level(), "user", train_on="all")
    assert (
        b"".join(one for one, _, _ in found) == b" Quser" + b" \xff" or b"".join(t for _, t, _ in found) == b"Quser\xff"
    )
    assert all(b"INST" not in one for one, _, _ in found)


def test_special_strings_in_a_text_are_text() -> None:
    found = chunks(byte_tokenizer(), byte_level(), "a<|im_end|>b</s>")
    assert b"".join(one for one, _, _ in found) == b"a<|im_end|>b</s>\xff"


def test_shared_ids_are_those_of_equal_bytes() -> None:
    student, teacher = sentencepiece("▁ab", "xyz"), byte_level(b" ab", b"q q")
    ours, theirs = TokenizerPair(student, teacher).shared_ids()
    names = {
        student._backend.id_to_token(i): teacher._backend.id_to_token(j) for i, j in zip(ours, theirs, strict=True)
    }
    assert names["▁ab"] == "Ġab" and names["a"] == "a" and names["</s>"] == "<|im_end|>"
    assert "xyz" not in names and len(set(theirs)) == len(theirs)


def test_plain_text_is_aligned_with_its_end() -> None:
    pair = TokenizerPair(sentencepiece("ab", "▁ab"), byte_level(b"ab", b" ab"))
    ids = pair.encode("ab ab", add_bos=True)
    found = pair.pair_text(ids, [True] * len(ids), "ab ab", add_eos=True)
    ours, theirs = pair._streams
    spelled = [
        (ours.spell(ids[a + 1 : b + 1]), theirs.spell(found.tokens[c + 1 : d + 1].tolist()))
        for a, b, c, d, _ in found.chunks_K5.tolist()
    ]
    # The teacher has no token before the text, so that nothing of it predicts the first one.
    assert spelled == [(b" ab", b" ab"), (b"\xff", b"\xff")]


def test_both_streams_are_cut_together() -> None:
    student, teacher = byte_tokenizer(max_seq_len=40), byte_level()
    pair = TokenizerPair(student, teacher)
    messages = chat("abcdefghijklmnopqrstuvwxyz")
    ids, trained = pair.tokenize_messages(messages)
    row = truncated(EncodedRow(ids, trained, teacher=pair.pair_messages(ids, trained, messages)), pair)
    assert len(row.ids) == 40 and row.teacher is not None
    assert (
        int(row.teacher.chunks_K5[:, 1].max()) == 38
    )  # the last token kept is an end that the text does not have there
    assert len(row.teacher.tokens) == int(row.teacher.chunks_K5[:, 3].max()) + 1  # it need not read on
    teacher.max_seq_len = 30
    row = truncated(EncodedRow(ids, trained, teacher=pair.pair_messages(ids, trained, messages)), pair)
    assert row.teacher is not None and len(row.teacher.tokens) == 30 and int(row.teacher.chunks_K5[:, 3].max()) == 29


def test_a_paired_dataset_gives_both_streams_with_workers_and_without() -> None:
    pair = pickle.loads(pickle.dumps(TokenizerPair(byte_tokenizer(max_seq_len=200), byte_level(b"th", b" the"))))
    dataset = quickstart_dataset(pair, train_on="answers", prompt="plain", split="train[:20]")
    assert dataset.is_paired and dataset.teacher_lengths is not None
    first, again = (next(Loader(dataset, batch_size=3, pad_id=0, num_workers=workers, seed=1)) for workers in (0, 1))
    for batch in (first, again):
        alignment = batch.targets.alignment
        assert alignment is not None and alignment.teacher_shape == tuple(batch.teacher_inputs["tokens"].shape)
        # What the student reads at a chunk's first position has as many bytes of the answer as what the teacher reads.
        assert (
            sorted(batch.targets.positions_N.tolist()) == (batch.labels.flatten() != -100).nonzero().flatten().tolist()
        )
    assert torch.equal(first.teacher_inputs["tokens"], again.teacher_inputs["tokens"])
    assert torch.equal(first.targets.positions_N, again.targets.positions_N)
    empty = dataset.collate([], 0)
    assert empty.targets.alignment is not None and empty.teacher_inputs["tokens"].shape == (1, 1)


def test_another_teacher_is_another_dataset() -> None:
    prints = {
        quickstart_dataset(TokenizerPair(byte_tokenizer(), teacher), split="train[:4]").fingerprint()
        for teacher in (byte_level(), byte_level(b"th"))
    }
    assert len(prints) == 2


def test_collated_chunks_are_those_of_the_rows() -> None:
    pair = TokenizerPair(byte_tokenizer(), byte_level(b"ab"))
    examples = []
    for answer in ("abab", "c"):
        ids, trained = pair.tokenize_messages(chat(answer))
        examples.append(make_example(ids, trained, pair.pair_messages(ids, trained, chat(answer))))
    batch = collate(examples, 0, is_paired=True)
    alignment = batch.targets.alignment
    assert alignment is not None
    width = batch.tokens.shape[1]
    for position, teacher_position in zip(
        batch.targets.positions_N[: alignment.num_chunks].tolist(), alignment.teacher_positions_K.tolist(), strict=True
    ):
        row, column = divmod(position, width)
        their_row, their_column = divmod(teacher_position, alignment.teacher_shape[1])
        ours = pair.student.decode(batch.tokens[row, : column + 1].tolist(), skip_special=False)
        theirs = pair.teacher.decode(
            batch.teacher_inputs["tokens"][their_row, : their_column + 1].tolist(), skip_special=False
        )
        assert row == their_row and ours == theirs  # both templates are ChatML
    assert np.array_equal(alignment.num_tokens_K.numpy(), [2, 2, 1, 1, 1])


@pytest.mark.parametrize("build", [byte_tokenizer, byte_level, sentencepiece])
def test_bytes_of_tokens_join_to_the_text(build: Any) -> None:
    tokenizer = build()
    spelled = tokenizer.token_bytes()
    text = "naïve 日本 x"
    joined = b"".join(spelled[i] for i in tokenizer.encode(text, add_bos=False, add_eos=False))
    assert joined.removeprefix(b" ") == text.encode() and all(
        spelled[i] is None for i in tokenizer.special_tokens.values()
    )


def test_a_stream_and_a_mixture_are_paired_too(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Q{i}", "output": f"abab {i}"}) + "\n" for i in range(6)))
    pair = TokenizerPair(byte_tokenizer(max_seq_len=300), byte_level(b"ab"))
    options = {"source": "json", "data_files": str(rows), "train_on": "answers"}
    stream = alpaca_dataset(pair, streaming=True, **options)
    mixed = mixed_dataset(pair, datasets=[stream, alpaca_dataset(pair, **options)], weights=[1, 1])
    for dataset in (stream, mixed):
        batch = next(Loader(dataset, batch_size=4, pad_id=0))
        assert dataset.is_paired and batch.targets.alignment is not None and batch.targets.alignment.num_chunks > 4


def test_a_dataset_of_ones_own_without_teacher_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dataset: .*student's tokens alone.*Example.*is_paired"):
        load_dataset(
            "dataset", {"_component_": "test_alignment.own_dataset"}, TokenizerPair(byte_tokenizer(), byte_level())
        )


def own_dataset(tokenizer: Any) -> TokenizedDataset:
    return TokenizedDataset([([1, 2], [True, True])], DatasetStats("own"))
