"""Floating-point operations that a model's texts take: those of its matrices and of attention, by formula, without a measurement.

A product of matrices takes 2 operations for each number of the weight and token. What is elementwise (norms, activations, softmax) is left
out, as is usual, and so is what a device computes besides: padding, idle rows, recomputed activations, draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kdtune.models.transformer import Transformer


@dataclass(frozen=True)
class ModelFlops:
    """The operations of a model's forward, and of forward and backward in training."""

    layers: int
    """Of all layers, for a token: 2 for each number of their matrices, adapters included."""
    trained_layers: int
    """The part of it whose matrices are trained."""
    attention: int
    """Of all layers, for a token and one that it attends to: 2 for its score and 2 for its value, per head and dimension."""
    head: int
    """Of the output head, for a token whose logits are computed."""
    trained_head: int
    """`head` if it is trained, else 0."""

    @classmethod
    def of(cls, model: Transformer) -> "ModelFlops":
        """Count those of a model; of one in shards, those of all processes that share it."""
        matrices = [one for one in model.layers.parameters() if one.ndim == 2]
        head = [one for one in model.output.parameters() if one.ndim == 2]
        return cls(
            2 * sum(one.numel() for one in matrices),
            2 * sum(one.numel() for one in matrices if one.requires_grad),
            4 * model.config.attention_dim * model.config.num_layers,
            2 * sum(one.numel() for one in head),
            2 * sum(one.numel() for one in head if one.requires_grad),
        )

    def forward(self, lengths: Sequence[int], num_logits: int) -> int:
        """Return those of a forward of texts of these numbers of tokens, whose tokens attend to all before them and themselves: no window.

        `num_logits` is the number of tokens whose logits are computed.
        """
        return self.layers * sum(lengths) + self._attended(lengths) + self.head * num_logits

    def training(self, lengths: Sequence[int], num_logits: int) -> int:
        """Return those of forward and backward: each input has a gradient, and so has each matrix that is trained."""
        of_layers = (2 * self.layers + self.trained_layers) * sum(lengths)
        return of_layers + 3 * self._attended(lengths) + (2 * self.head + self.trained_head) * num_logits

    def _attended(self, lengths: Sequence[int]) -> int:
        return self.attention * sum(length * (length + 1) // 2 for length in lengths)
