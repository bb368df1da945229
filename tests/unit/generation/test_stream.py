"""Text as it comes: whole characters only, and together what the ids decode to at once."""

import random

import pytest

from kdtune.generation import TextStream
from kdtune.tokenizers import byte_tokenizer, load

TEXTS = ["Hello, world!", "Grüße, 你好, 🎉👩‍🚀 ok", "  two  spaces\n\n\tand a tab ", "é" * 40, "naïve 日本語テキスト"]


def streamed(tokenizer, ids) -> list[str]:
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    for token in ids:
        stream.add(token)
    assert stream.finish() == tokenizer.decode(ids)
    return pieces


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_wait_until_a_character_is_whole(text):
    tokenizer = byte_tokenizer()
    pieces = streamed(tokenizer, tokenizer.encode(text, add_bos=False, add_eos=False))
    assert pieces == list(text)


def test_an_incomplete_end_is_written_at_last():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a🎉", add_bos=False, add_eos=False)[:-1]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
    assert tokenizer.decode(ids) != "a"


def check_stream_equals_text(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text, add_bos=False)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    draw = random.Random(0)
    for _ in range(100):  # random ids: bytes that are no characters, special tokens
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(30)]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_random_bytes():
    check_stream_equals_text(byte_tokenizer())


@pytest.mark.real
def test_smollm2(smollm2_gguf):
    check_stream_equals_text(load(smollm2_gguf))


@pytest.mark.real
def test_llama3(llama3_tokenizer_file):
    check_stream_equals_text(load(llama3_tokenizer_file))
