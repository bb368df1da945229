"""Ranks as a tokenizer.json: ids against tiktoken's own merging, on vocabularies that no training has made regular."""

import random

import pytest
import tiktoken
from tokenizers import pre_tokenizers

from kdtune.tokenizers.bpe import byte_symbols, merges_from_ranks, tokenizer_from_ranks

PATTERN = r"\s*\S+|\s+"


def ranks_of(seed: int, size: int = 400) -> dict[bytes, int]:
    """All bytes, then unions of two tokens drawn at random: many tokens can be merged from several pairs."""
    draw = random.Random(seed)
    singles = [bytes([value]) for value in range(256)]
    common = [b"a", b"b", b"c", b" ", "é".encode()[:1], "é".encode()[1:]]
    ranks = {token: rank for rank, token in enumerate(singles)}
    while len(ranks) < size:
        known = [token for token in ranks if len(token) > 1 and len(token) < 6] + common * 3
        ranks.setdefault(draw.choice(known) + draw.choice(known), len(ranks))
    return ranks


@pytest.mark.parametrize("seed", range(8))
def test_ids_equal_tiktoken(seed: int) -> None:
    ranks, draw = ranks_of(seed), random.Random(seed)
    ours = tokenizer_from_ranks(ranks, PATTERN)
    reference = tiktoken.Encoding("reference", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    for _ in range(400):
        text = "".join(draw.choices(["a", "b", "c", " ", "é", "x"], k=draw.randint(1, 40)))
        assert ours.encode(text).ids == reference.encode_ordinary(text), text
        assert ours.decode(ours.encode(text).ids) == text


def test_a_token_that_merging_does_not_reach_has_no_pair() -> None:
    # "abc" would come from a + bc or ab + c; "ab" comes first and then "ab" + "c" is it. "bcd" needs "bc" or "cd".
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"d": 3, b"ab": 4, b"abc": 5, b"bcd": 6}
    assert merges_from_ranks(ranks) == [(b"a", b"b"), (b"ab", b"c")]


def test_symbols_are_the_alphabet_of_the_library() -> None:
    assert sorted(byte_symbols()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    pretokenized = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("a é\n\x7f\xad")
    assert pretokenized[0][0] == "".join(byte_symbols()[value] for value in "a é\n\x7f\xad".encode())
