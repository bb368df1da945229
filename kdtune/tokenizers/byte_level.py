"""Byte-level byte-pair encoding for the `tokenizers` library: splitting into words, and merges from ranks."""

from collections.abc import Mapping

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
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
