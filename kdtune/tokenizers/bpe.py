"""Byte-pair encodings for the `tokenizers` library: of bytes, with merges from tiktoken's ranks, and sentencepiece's."""

import re
from collections.abc import Mapping, Sequence
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE


def byte_level_words(pattern: str | None = None, *, single_digits: bool = False) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer of GPT-2's words, or those of `pattern`; `single_digits` first isolates every digit."""
    steps: list[pre_tokenizers.PreTokenizer] = []
    if single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


def byte_symbols() -> list[str]:
    """Return the character that represents each of the 256 bytes: itself if Latin-1 prints it, else the next from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [value for value in range(256) if value not in printable]
    return [chr(value if value in printable else 256 + hidden.index(value)) for value in range(256)]


@cache
def _values() -> dict[str, int]:
    return {symbol: value for value, symbol in enumerate(byte_symbols())}


def symbol_bytes(token: str) -> bytes | None:
    """Return the bytes that a token of byte symbols stands for; None if another character is in it."""
    values = [_values().get(symbol) for symbol in token]
    return None if None in values else bytes(value for value in values if value is not None)


def piece_bytes(piece: str) -> bytes:
    """Return the bytes of a sentencepiece piece: "▁" is a space, "<0x41>" one byte."""
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte[1])
    return piece.replace("▁", " ").encode()


def tokenizer_from_ranks(ranks: Mapping[bytes, int], pattern: str) -> Tokenizer:
    """Build a tokenizer with tiktoken's ids: the ranks are the ids, `pattern` splits the words."""
    symbols = byte_symbols()
    names = {token: "".join(symbols[value] for value in token) for token in ranks}
    merges = [(names[left], names[right]) for left, right in merges_from_ranks(ranks)]
    # tiktoken takes a word that has a rank as it is, even where merging would not lead there.
    backend = Tokenizer(BPE(vocab={names[t]: rank for t, rank in ranks.items()}, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = byte_level_words(pattern)
    backend.decoder = decoders.ByteLevel()
    return backend


def merges_from_ranks(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pair that each longer token is merged from, in the order of their ranks.

    tiktoken repeatedly joins the neighbours whose union has the lowest rank, the leftmost first. Merges inside a token do
    not depend on the text around it as long as none crosses its ends, so a token has at most one such pair: the last state
    but one of merging the token alone. A token that merging never produces has none.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            found = [(ranks[pair], i) for i in range(len(parts) - 1) if (pair := parts[i] + parts[i + 1]) in ranks]
            if not found:
                break
            _, at = min(found)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def sentencepiece_bpe(tokens: Sequence[str], scores: Sequence[float], *, unknown: str, prefix: bool) -> Tokenizer:
    """Build a tokenizer with the ids of a sentencepiece BPE model; the caller has to add special tokens.

    Args:
        tokens: the pieces, in the order of their ids.
        scores: scores of the pieces; the best is merged first.
        unknown: the piece for text that no other covers (with byte pieces there is none).
        prefix: put a space before a text.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(
        BPE(vocab=vocab, merges=_merges(tokens, scores, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    return backend


def _merges(tokens: Sequence[str], scores: Sequence[float], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return pairs of pieces that make another piece, best score of the result first: sentencepiece's order of merging."""
    pairs = []
    for i, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                pairs.append((-scores[i], i, vocab[left], vocab[right]))
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(pairs)]
