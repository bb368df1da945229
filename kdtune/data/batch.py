"""Collate examples into batches, padded or end to end: the model's inputs and the loss's targets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kdtune.constants import IGNORE_INDEX
from kdtune.data.transforms import Example
from kdtune.errors import DataError
from kdtune.losses import Signal, Targets
from kdtune.models import Documents


@dataclass(frozen=True)
class Batch:
    """A micro-batch: call the model as ``model(**batch.inputs)`` and the loss with ``batch.targets``."""

    inputs: Mapping[str, Any]
    """Keyword arguments of the model's forward, tensors and `Documents`; "tokens" are int64 ids: [B, S], padded on the right,
    or [1, T] with "documents" that say where each row begins."""
    targets: Targets
    """Positions that have a label, and the labels, found on the CPU."""
    lengths: tuple[int, ...]
    """Number of tokens of each row, without padding; of each document where they are end to end."""
    example_ids: tuple[int, ...] | None = None
    """Index of each row's example in its dataset, in a pack of each document's; None for a stream, and where an example is cut to
    fill a pack."""
    prompt_lengths: tuple[int, ...] | None = None
    """Number of tokens of each row before the first trained one."""
    routes: tuple[str | None, ...] | None = None
    """Of each row, the value of the column that chooses its teacher; None without one."""
    own_teacher_inputs: Mapping[str, Any] | None = None
    """The same examples for a teacher with another tokenizer; None: it reads `inputs`."""
    teacher_lengths: tuple[int, ...] | None = None
    """Number of its tokens of each row; None without them."""
    signal: Signal | None = None
    """The teacher's signal, on the device that computes, where it is known beforehand; None: the teacher is asked for it."""

    @classmethod
    def from_labels(cls, tokens_BS: Tensor, labels_BS: Tensor, lengths: Sequence[int] | None = None) -> "Batch":
        """Make a batch of int64 tokens and shifted labels [B, S], IGNORE_INDEX where there is none; lengths=None: no padding."""
        if lengths is None:
            lengths = [tokens_BS.shape[1]] * len(tokens_BS)
        return cls({"tokens": tokens_BS}, Targets.from_labels(labels_BS), tuple(lengths))

    @property
    def teacher_inputs(self) -> Mapping[str, Any]:
        """Keyword arguments of the teacher's forward: `inputs`, or the same text in its own tokens."""
        return self.inputs if self.own_teacher_inputs is None else self.own_teacher_inputs

    @property
    def tokens(self) -> Tensor:
        """Token ids [B, S], or [1, T]."""
        tokens: Tensor = self.inputs["tokens"]
        return tokens

    @property
    def labels(self) -> Tensor:
        """Labels [B, S] for a loss over plain logits: the target of each position, or IGNORE_INDEX."""
        return self.targets.to_labels()

    @property
    def num_valid_tokens(self) -> int:
        """Number of positions that have a label."""
        return len(self.targets)

    @property
    def num_tokens(self) -> int:
        """Number of tokens without padding."""
        return sum(self.lengths)

    @property
    def num_padded_tokens(self) -> int:
        """Number of padding positions; 0 for the batch of a process that has no example left."""
        return self.tokens.numel() - self.num_tokens if self.num_tokens else 0

    @property
    def row_starts(self) -> list[int]:
        """Index of each row's first token among the flattened tokens."""
        if "documents" in self.inputs:
            return [0, *accumulate(self.lengths)][:-1]
        return [row * self.tokens.shape[1] for row in range(len(self.lengths))]

    def without_padding(self) -> "Batch":
        """Return the batch, on the CPU, with its rows end to end, [1, T] with `Documents`: the same sums, no padding computed.

        Returned as they are: the batch of a process that has no example left, and one whose inputs are not tokens alone, for
        only its dataset knows what belongs where.

        Raises:
            DataError: a label stands on padding.
        """
        both = [self.inputs] if self.own_teacher_inputs is None else [self.inputs, self.own_teacher_inputs]
        if self.num_tokens == 0 or any(set(inputs) != {"tokens"} for inputs in both):
            return self
        inputs, index_T = _end_to_end(self.tokens, self.lengths)
        targets = self.targets.moved(index_T, inputs["tokens"].shape)
        if len(targets) and int(targets.positions_N.min()) < 0:
            raise DataError(
                f"a batch has a label beyond the lengths of its rows, {list(self.lengths)}; lengths leave out only padding"
            )
        own = None
        if self.own_teacher_inputs is not None and self.teacher_lengths is not None:
            own, teacher_index_T = _end_to_end(self.own_teacher_inputs["tokens"], self.teacher_lengths)
            if targets.alignment is not None:
                targets = replace(targets, alignment=targets.alignment.moved(teacher_index_T, own["tokens"].shape))
        return replace(self, inputs=inputs, targets=targets, own_teacher_inputs=own)

    def of_rows(self, rows: Sequence[int]) -> "Batch":
        """Return a batch on the CPU of some of its `rows`, in their order, in the same layout; of no row, one padding token.

        Of inputs that are tokens alone, without a teacher's own.
        """
        if not rows:
            return Batch.from_labels(torch.zeros((1, 1), dtype=torch.int64), torch.full((1, 1), IGNORE_INDEX), (0,))
        starts, width, is_padded = self.row_starts, self.tokens.shape[-1], "documents" not in self.inputs
        sizes = [width if is_padded else self.lengths[row] for row in rows]
        kept_T = torch.cat(
            [torch.arange(starts[row], starts[row] + size) for row, size in zip(rows, sizes, strict=True)]
        )
        tokens = self.tokens.flatten()[kept_T].view(-1 if is_padded else 1, width if is_padded else len(kept_T))
        labels_T = self.labels.flatten()[kept_T].view(tokens.shape)
        batch = Batch.from_labels(tokens, labels_T, [self.lengths[row] for row in rows])
        inputs = (
            {"tokens": tokens} if is_padded else {"tokens": tokens, "documents": Documents.of_lengths(batch.lengths)}
        )
        chosen: dict[str, Any] = {
            name: None if (values := getattr(self, name)) is None else tuple(values[row] for row in rows)
            for name in ("example_ids", "prompt_lengths", "routes")
        }
        return replace(batch, inputs=inputs, **chosen)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its tensors on a device. On CUDA the copy is asynchronous, from pinned memory."""
        move = mover(torch.device(device))

        def moved(inputs: Mapping[str, Any]) -> dict[str, Any]:
            return {name: one.map(move) if isinstance(one, Documents) else move(one) for name, one in inputs.items()}

        own = self.own_teacher_inputs
        return replace(
            self,
            inputs=moved(self.inputs),
            targets=self.targets.map(move),
            own_teacher_inputs=None if own is None else moved(own),
        )


def mover(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function that copies a tensor to a device; to CUDA without a wait of the host, from pinned memory."""
    if device.type != "cuda":
        return lambda tensor: tensor.to(device)
    # The allocator keeps the pinned memory until the copy is done.
    return lambda tensor: (tensor if tensor.is_cuda else tensor.pin_memory()).to(device, non_blocking=True)


def _end_to_end(tokens_BS: Tensor, lengths: Sequence[int]) -> tuple[dict[str, Any], Tensor]:
    """Return a model's inputs without padding, and the new index of each of the flattened positions, -1 for padding."""
    documents, width = Documents.of_lengths(lengths), tokens_BS.shape[1]
    rows_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    kept_T = rows_T * width + documents.positions_T
    index_T = torch.full((tokens_BS.numel(),), -1)
    index_T[kept_T] = torch.arange(len(kept_T))
    return {"tokens": tokens_BS.flatten()[kept_T][None], "documents": documents}, index_T


def collate(examples: Sequence[Example], pad_id: int, *, is_paired: bool = False, padding_free: bool = False) -> Batch:
    """Pad examples on the right to the longest (tokens with pad_id, labels with IGNORE_INDEX) and make a batch.

    Without examples the batch is one padding token, which counts nowhere: it gives a process without a batch left
    something to compute while others still have one.

    Each document of a pack is a row.

    is_paired: each example has the text in the teacher's own tokens too, see `Dataset.is_paired`. padding_free: rows end to
    end, as `Batch.without_padding` lays them; not together with is_paired.
    """
    examples = [one for example in examples for one in example.documents or (example,)]
    if not examples:
        batch = Batch.from_labels(torch.full((1, 1), pad_id), torch.full((1, 1), IGNORE_INDEX), (0,))
        return _with_teacher(batch, []) if is_paired else batch
    lengths = [len(example.tokens) for example in examples]
    tokens, labels = (
        _rows([getattr(example, name) for example in examples], fill, padding_free)
        for name, fill in (("tokens", pad_id), ("labels", IGNORE_INDEX))
    )
    batch = Batch.from_labels(tokens, labels, lengths)
    if padding_free:
        batch = replace(batch, inputs={"tokens": tokens, "documents": Documents.of_lengths(lengths)})
    indices = [example.index for example in examples if example.index is not None]
    batch = replace(
        batch,
        example_ids=tuple(indices) if len(indices) == len(examples) else None,
        prompt_lengths=tuple(example.prompt_length for example in examples),
        routes=tuple(example.route for example in examples) if any(example.route for example in examples) else None,
    )
    return _with_teacher(batch, [example.teacher for example in examples]) if is_paired else batch


def _rows(parts: Sequence[Any], fill: int, padding_free: bool) -> Tensor:
    """Return arrays of ids as int64 rows [B, S], filled on the right, or end to end in one, [1, T]."""
    if padding_free:
        return torch.cat([torch.from_numpy(part).to(torch.int64) for part in parts])[None]
    rows = torch.full((len(parts), max(map(len, parts))), fill, dtype=torch.int64)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = torch.from_numpy(part)
    return rows


def _with_teacher(batch: Batch, teachers: Sequence[Any]) -> Batch:
    """Return the batch with the teacher's own tokens and the chunks shared with the student's; `teachers` as `Example.teacher`."""
    from kdtune.losses import align  # only a cross-tokenizer run needs it

    width = max((len(teacher.tokens) for teacher in teachers), default=1)
    tokens = torch.zeros((len(batch.lengths), width), dtype=torch.int64)  # padding: any id will do
    chunks = [torch.zeros((0, 5), dtype=torch.int64)]
    for row, teacher in enumerate(teachers):
        tokens[row, : len(teacher.tokens)] = torch.from_numpy(teacher.tokens)
        at = torch.tensor([row * batch.tokens.shape[1]] * 2 + [row * width] * 2 + [0])
        chunks.append(torch.from_numpy(teacher.chunks_K5) + at)
    targets = align(batch.targets, torch.cat(chunks), tokens)
    lengths = tuple(len(teacher.tokens) for teacher in teachers)
    return replace(batch, targets=targets, own_teacher_inputs={"tokens": tokens}, teacher_lengths=lengths)
