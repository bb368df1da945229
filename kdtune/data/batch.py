"""Collate examples into padded batches: the model's inputs and the loss's targets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdtune.constants import IGNORE_INDEX
from kdtune.data.transforms import Example
from kdtune.losses import Targets


@dataclass(frozen=True)
class Batch:
    """A micro-batch: call the model as ``model(**batch.inputs)`` and the loss with ``batch.targets``."""

    inputs: Mapping[str, Tensor]
    """Keyword arguments of the model's forward; "tokens" are int64 ids [B, S], padded on the right."""
    targets: Targets
    """Positions that have a label, and the labels, found on the CPU."""
    lengths: tuple[int, ...]
    """Number of tokens of each row, without padding."""
    example_ids: tuple[int, ...] | None = None
    """Index of each row's example in its dataset; None for a stream."""
    prompt_lengths: tuple[int, ...] | None = None
    """Number of tokens of each row before the first trained one."""

    @classmethod
    def from_labels(cls, tokens_BS: Tensor, labels_BS: Tensor, lengths: Sequence[int] | None = None) -> "Batch":
        """Make a batch of int64 tokens and shifted labels [B, S], IGNORE_INDEX where there is none; lengths=None: no padding."""
        if lengths is None:
            lengths = [tokens_BS.shape[1]] * len(tokens_BS)
        return cls({"tokens": tokens_BS}, Targets.from_labels(labels_BS), tuple(lengths))

    @property
    def tokens(self) -> Tensor:
        """Token ids [B, S]."""
        return self.inputs["tokens"]

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

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its tensors on a device. On CUDA the copy is asynchronous, from pinned memory."""
        device = torch.device(device)
        move = _copy_to_cuda(device) if device.type == "cuda" else lambda tensor: tensor.to(device)
        targets = replace(
            self.targets, positions_N=move(self.targets.positions_N), labels_N=move(self.targets.labels_N)
        )
        return replace(self, inputs={name: move(tensor) for name, tensor in self.inputs.items()}, targets=targets)


def _copy_to_cuda(device: torch.device) -> Callable[[Tensor], Tensor]:
    # The host does not wait; the allocator keeps the pinned memory until the copy is done.
    return lambda tensor: (tensor if tensor.is_cuda else tensor.pin_memory()).to(device, non_blocking=True)


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad examples on the right to the longest (tokens with pad_id, labels with IGNORE_INDEX) and make a batch.

    Without examples the batch is one padding token, which counts nowhere: it gives a process without a batch left
    something to compute while others still have one.
    """
    if not examples:
        return Batch.from_labels(torch.full((1, 1), pad_id), torch.full((1, 1), IGNORE_INDEX), (0,))
    lengths = [len(example.tokens) for example in examples]
    tokens = torch.full((len(examples), max(lengths)), pad_id, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        tokens[row, :length] = torch.from_numpy(example.tokens)
        labels[row, :length] = torch.from_numpy(example.labels)
    indices = [example.index for example in examples if example.index is not None]
    return replace(
        Batch.from_labels(tokens, labels, lengths),
        example_ids=tuple(indices) if len(indices) == len(examples) else None,
        prompt_lengths=tuple(example.prompt_length for example in examples),
    )
