"""Token ids and training flags, truncation, and the only place where labels are shifted."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kdtune.constants import IGNORE_INDEX

Encoded: TypeAlias = tuple[list[int], list[bool]]
"""Token ids, and for each whether it is a training target."""


@dataclass(frozen=True)
class EncodedRow:
    """A row's token ids [S] and training flags [S], and how it was changed."""

    ids: Sequence[int]
    trained: Sequence[bool]
    truncated: bool = False
    """True if the example was cut to max_seq_len."""
    remarks: Sequence[str] = ()
    """Further notes, such as content that the chat template omits."""


@dataclass(frozen=True)
class Example:
    """One training example: int64 arrays [S]; labels[t] is the target of position t, or IGNORE_INDEX."""

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    index: int | None = None
    """Index of the example in its dataset; None in a stream."""

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first trained one; all of them if none is trained."""
        has_label = self.labels != IGNORE_INDEX
        return int(has_label.argmax()) + 1 if has_label.any() else len(self.tokens)


def make_example(ids: Sequence[int] | npt.NDArray[Any], trained: Sequence[bool] | npt.NDArray[Any]) -> Example:
    """Make an example of a token sequence: position t is labelled with token t + 1 if that token is trained on.

    The last position has no next token: its label is IGNORE_INDEX. Whether the first token is trained on has no effect.
    """
    tokens = np.asarray(ids, dtype=np.int64)
    labels = np.full_like(tokens, IGNORE_INDEX)
    labels[:-1] = np.where(np.asarray(trained, dtype=bool)[1:], tokens[1:], IGNORE_INDEX)
    return Example(tokens, labels)


def is_trainable(trained: Sequence[bool]) -> bool:
    """Return whether the example would have a valid label."""
    return any(trained[1:])


def truncate(ids: list[int], trained: list[bool], max_seq_len: int | None, stop_ids: Collection[int]) -> Encoded:
    """Keep the first max_seq_len ids, the last of them replaced by the sequence's own final end token (if it has one).

    The end token is the last id of the sequence that is in stop_ids. At the cut it is trained on only if the token it
    replaces was: a cut inside the prompt must not teach the model to answer with silence.
    """
    if max_seq_len is None or len(ids) <= max_seq_len:
        return ids, trained
    kept = ids[:max_seq_len]
    end = next((token for token in reversed(ids) if token in stop_ids), None)
    if end is not None:
        kept[-1] = end
    return kept, trained[:max_seq_len]
