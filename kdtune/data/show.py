"""Format examples and the counts of their rows as text for a terminal."""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from kdtune.constants import IGNORE_INDEX
from kdtune.data.dataset import DatasetStats
from kdtune.data.transforms import Example
from kdtune.escape import printable

if TYPE_CHECKING:
    from kdtune.data.alignment import TeacherExample, TokenizerPair
    from kdtune.tokenizers import Tokenizer

_COLOURS = ("\x1b[1;32m", "\x1b[0m")  # bold green
_MARKS = ("[[", "]]")
_NUM_BINS = 8
_LABEL_WIDTH = 26


def trained_flags(example: Example) -> list[bool]:
    """Return for each token [S] whether it is a training target; the first never is."""
    return [False, *(example.labels[:-1] != IGNORE_INDEX).tolist()]


def example_text(
    example: Example, tokenizer: "Tokenizer", *, colour: bool = False, longest_stretch: int | None = None
) -> str:
    """Format the example's text with its special tokens; trained spans are coloured, or else stand between [[ and ]].

    longest_stretch: longest span, in characters, that is shown in full; the middle of a longer one is omitted.
    """
    before, after = _COLOURS if colour else _MARKS
    ids = example.tokens.tolist()
    text, end, parts = "", 0, []
    for is_trained, group in groupby(trained_flags(example)):
        end += len(list(group))
        # Decoded from the start: what a token spells may depend on those before it.
        upto = tokenizer.decode(ids[:end], skip_special=False)
        shown = _shortened(printable(upto[len(text) :]), longest_stretch)
        parts.append(f"{before}{shown}{after}" if is_trained else shown)
        text = upto
    return "".join(parts)


def chunks_text(
    example: Example, teacher: "TeacherExample", pair: "TokenizerPair", *, longest: int | None = None
) -> str:
    """Format the chunks that a teacher with another tokenizer shares with the student, one a line: the tokens of both models.

    longest: number of chunks that are shown; None: all.
    """
    rows = [
        ["|".join(pieces) for pieces in pair.pieces(example.tokens[a + 1 : b + 1], teacher.tokens[c + 1 : d + 1])]
        for a, b, c, d, _ in teacher.chunks_K5[:longest]
    ]
    width = max((len(printable(ours)) for ours, _ in rows), default=0)
    lines = [f"  {printable(ours):<{width}}   {printable(theirs)}" for ours, theirs in rows]
    num_left = len(teacher.chunks_K5) - len(rows)
    return "\n".join(
        [
            f"the teacher reads {len(teacher.tokens):,} tokens; {len(teacher.chunks_K5):,} chunks are compared, tokens of the student "
            "and of the teacher:",
            *lines,
            *([f"  ... {num_left:,} more ..."] if num_left else []),
        ]
    )


def _shortened(text: str, limit: int | None) -> str:
    if limit is None or len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half:,} characters left out ...\n{text[-half:]}"


def rows_table(report: DatasetStats, lengths: Sequence[int], num_trained: int, max_seq_len: int | None) -> str:
    """Summarize the rows: used and dropped, tokens, and trained tokens; 60 columns wide."""
    total = sum(lengths)
    lines = [("rows read", f"{report.rows:,}")]
    for name, count in (
        ("filtered out", report.filtered),
        ("left out: too long", report.too_long),
        ("left out: nothing to train", report.untrainable),
    ):
        if count:
            lines.append((f"  {name}", f"{count:,}"))
    lines.append(("examples", f"{report.examples:,}"))
    if report.truncated:
        lines.append((f"  cut to {max_seq_len:,} tokens" if max_seq_len else "  cut", f"{report.truncated:,}"))
    lines.append(("tokens", f"{total:,}"))
    if total:
        lines.append(("  trained on", f"{num_trained:,} ({num_trained / total:.1%})"))
        lines.append(("  an example, mean", f"{total / len(lengths):,.1f}"))
        longest = f"{max(lengths):,}" + ("" if max_seq_len is None else f" (max_seq_len {max_seq_len:,})")
        lines.append(("  longest", longest))
    return "\n".join(f"{name:<{_LABEL_WIDTH}} {value}" for name, value in lines)


def histogram(lengths: Sequence[int], *, width: int = 60) -> str:
    """Histogram of example lengths in tokens: at most eight bars of round bounds, `width` columns wide."""
    if not lengths:
        return ""
    shortest, longest = min(lengths), max(lengths)
    step = _round_up((longest - shortest + 1) / _NUM_BINS)
    first = shortest // step * step
    counts = np.bincount((np.asarray(lengths) - first) // step)
    starts = [first + i * step for i in range(len(counts))]
    labels = [f"{start:,}" if step == 1 else f"{start:,}-{start + step - 1:,}" for start in starts]
    label_width, count_width = max(map(len, labels)), len(f"{counts.max():,}")
    room = max(width - label_width - count_width - 4, 8)
    lines = [
        f"  {label:>{label_width}} {'#' * math.ceil(count / counts.max() * room):<{room}} {count:>{count_width},}".rstrip()
        for label, count in zip(labels, counts, strict=True)
    ]
    return "\n".join(["tokens an example:", *lines])


def _round_up(value: float) -> int:
    """Round the value up to the next of 1, 2, 5, 10, 20, 50, ..."""
    magnitude = 10 ** math.floor(math.log10(max(value, 1)))
    return next(int(magnitude * digit) for digit in (1, 2, 5, 10) if magnitude * digit >= value)


def count_trained(examples: Iterable[Example]) -> int:
    """Count the trained tokens of some examples."""
    return sum(int((example.labels != IGNORE_INDEX).sum()) for example in examples)
