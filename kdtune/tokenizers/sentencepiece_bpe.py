"""Sentencepiece's byte-pair encoding for the `tokenizers` library."""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE


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
