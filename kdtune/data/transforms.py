"""Token ids and training flags, truncation, and the only place where labels are shifted."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kdtune.constants import IGNORE_INDEX

if TYPE_CHECKING:
    from kdtune.data.alignment import TeacherExample, TokenizerPair
    from kdtune.tokenizers import Tokenizer

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
    teacher: "TeacherExample | None" = None
    """The same text in the tokens of a teacher with another tokenizer."""
    route: str | None = None
    """Value of the column that chooses the teacher; None without one."""


@dataclass(frozen=True)
class Example:
    """One training example: int64 arrays [S]; labels[t] is the target of position t, or IGNORE_INDEX."""

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    index: int | None = None
    """Index of the example in its dataset; None in a stream, and of a document that is part of an example."""
    teacher: "TeacherExample | None" = None
    """The same text in the tokens of a teacher with another tokenizer; None: the teacher reads these tokens."""
    route: str | None = None
    """Value of the column that chooses the teacher (`kdtune.teachers.Routed`); None without one."""
    documents: tuple["Example", ...] = ()
    """Of a pack: the documents that its tokens and labels are, end to end; (): one document."""

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first trained one; all of them if none is trained."""
        has_label = self.labels != IGNORE_INDEX
        return int(has_label.argmax()) + 1 if has_label.any() else len(self.tokens)


def unnumbered(example: Example) -> Example:
    """Return an example, or a pack, whose index in another dataset means nothing where it is used."""
    return replace(example, index=None, documents=tuple(replace(one, index=None) for one in example.documents))


def make_example(
    ids: Sequence[int] | npt.NDArray[Any],
    trained: Sequence[bool] | npt.NDArray[Any],
    teacher: "TeacherExample | None" = None,
    route: str | None = None,
) -> Example:
    """Make an example of a token sequence: position t is labelled with token t + 1 if that token is trained on.

    The last position has no next token: its label is IGNORE_INDEX. Whether the first token is trained on has no effect.
    ids and trained are of the student; teacher and route as in `Example`.
    """
    tokens = np.asarray(ids, dtype=np.int64)
    labels = np.full_like(tokens, IGNORE_INDEX)
    labels[:-1] = np.where(np.asarray(trained, dtype=bool)[1:], tokens[1:], IGNORE_INDEX)
    return Example(tokens, labels, teacher=teacher, route=route)


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


def pair_of(tokenizer: Any) -> "TokenizerPair | None":
    """Return the pair that a tokenizer is, of a student's and a teacher's; None if it is one tokenizer."""
    return getattr(tokenizer, "pair", None)


def fits(row: EncodedRow, tokenizer: "Tokenizer") -> bool:
    """Return whether a row is within the tokenizer's max_seq_len; of a pair of tokenizers, within that of both."""
    room = tokenizer.max_seq_len
    if room is not None and len(row.ids) > room:
        return False
    pair = pair_of(tokenizer)
    room = None if pair is None else pair.teacher.max_seq_len
    return room is None or row.teacher is None or len(row.teacher.tokens) <= room


def truncated(row: EncodedRow, tokenizer: "Tokenizer") -> EncodedRow:
    """Return the row cut to the tokenizer's max_seq_len, see `truncate`; a pair of tokenizers cuts both models' tokens."""
    if fits(row, tokenizer):
        return row
    ids, trained = truncate(list(row.ids), list(row.trained), tokenizer.max_seq_len, tokenizer.stop_ids)
    teacher, pair = row.teacher, pair_of(tokenizer)
    if teacher is not None and pair is not None:
        # The last token kept may be an end that is not the text's.
        num_student = len(ids) - (len(ids) < len(row.ids))
        teacher = teacher.cut(num_student, pair.teacher.max_seq_len)
    return replace(row, ids=ids, trained=trained, truncated=True, teacher=teacher)
