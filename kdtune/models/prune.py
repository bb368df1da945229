"""Small students from large models by dropping layers: the choice of layers, measured, and the pruned model.

Shape suffixes: B batch, S sequence, C candidates (stacks that lack one layer), D embedding, N valid tokens,
V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdtune.constants import IGNORE_INDEX
from kdtune.errors import ConfigError
from kdtune.models.transformer import Transformer

# Tokens that go through a layer at once, and logits that exist at once: they bound the measurements' memory.
_TOKENS_AT_ONCE = 4096
_LOGITS_AT_ONCE = 2**26
# Hidden states that greedy removal keeps between two removals.
_STATE_BYTES = 2**30


class TokenBatch(Protocol):
    """Calibration text: right-padded ids [B, S] and labels [B, S], each the target of its position or IGNORE_INDEX."""

    @property
    def tokens(self) -> Tensor:
        """Token ids, int64."""

    @property
    def labels(self) -> Tensor:
        """Targets, int64, already shifted."""


@dataclass(frozen=True)
class RemovalStep:
    """One layer that greedy removal dropped, and what the model without it and the earlier ones loses."""

    layer: int
    """Its index in the original model."""
    loss: float
    """Nats per valid token after the removal."""


def keep_layers(model: Transformer, layers: Sequence[int]) -> Transformer:
    """A model of the given layers of ``model``, in order, that **shares** its weights.

    No copy is made, so that a large model fits in memory once: training one of the two changes the other. Use
    ``copy.deepcopy`` where both go on living.

    Raises:
        ConfigError: The indices are not strictly increasing within the model.
    """
    num_layers = model.config.num_layers
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= num_layers:
        raise ConfigError(
            f"layers={list(layers)}: must be strictly increasing indices from 0 to {num_layers - 1}, at least one"
        )
    with torch.device("meta"):
        pruned = Transformer(replace(model.config, num_layers=len(layers)))
    pruned.tok_embeddings, pruned.norm, pruned.output = model.tok_embeddings, model.norm, model.output
    pruned.layers = nn.ModuleList(model.layers[index] for index in layers)
    return pruned.train(model.training)


def evenly_spaced(num_layers: int, keep: int) -> list[int]:
    """``keep`` of ``num_layers`` indices at equal distances, with the first and the last (for keep=1 the first).

    >>> evenly_spaced(30, 4)
    [0, 10, 19, 29]
    """
    _check_keep(num_layers, keep)
    if keep == 1:
        return [0]
    return [(2 * index * (num_layers - 1) + keep - 1) // (2 * (keep - 1)) for index in range(keep)]


def most_influential(influence: Sequence[float], keep: int) -> list[int]:
    """The ``keep`` indices of greatest influence, increasing; ShortGPT's choice given :func:`block_influence`.

    >>> most_influential([0.9, 0.1, 0.3, 0.5], keep=2)
    [0, 3]
    """
    _check_keep(len(influence), keep)
    return sorted(sorted(range(len(influence)), key=lambda index: -influence[index])[:keep])


@torch.no_grad()
def block_influence(model: Transformer, batches: Iterable[TokenBatch]) -> list[float]:
    """Per layer, 1 minus the mean cosine of its input and output over valid tokens (ShortGPT, arXiv 2403.03853).

    Near 0: the layer hardly changes the residual stream.
    """
    totals = torch.zeros(model.config.num_layers, dtype=torch.float64)
    count = 0
    for batch in batches:
        valid = _valid(batch)
        hidden_BSD, rope = _embed(model, batch)
        for index, layer in enumerate(model.layers):
            output_BSD = _through(layer, hidden_BSD, rope)
            cosines_N = functional.cosine_similarity(hidden_BSD[valid].double(), output_BSD[valid].double(), dim=-1)
            totals[index] += cosines_N.sum().cpu()
            hidden_BSD = output_BSD
        count += int(valid.sum())
    return (1 - totals / _checked_count(count)).tolist()


@torch.no_grad()
def mean_loss(model: Transformer, batches: Iterable[TokenBatch], layers: Sequence[int] | None = None) -> float:
    """Cross entropy in nats per valid token of the model, or of a stack of only the given layers of it."""
    stack = model.layers if layers is None else [model.layers[index] for index in layers]
    total, count = 0.0, 0
    for batch in batches:
        hidden_BSD, rope = _embed(model, batch)
        for layer in stack:
            hidden_BSD = _through(layer, hidden_BSD, rope)
        total += _summed_loss(model, hidden_BSD, batch)
        count += int(_valid(batch).sum())
    return total / _checked_count(count)


@torch.no_grad()
def removal_losses(model: Transformer, batches: Iterable[TokenBatch]) -> list[float]:
    """For each layer, the loss in nats per valid token of the model without it."""
    never = model.config.num_layers + 1
    return _mean_over_texts(_Text(model, batch).losses_without_each(list(model.layers), 0, never) for batch in batches)


@torch.no_grad()
def greedy_removal(
    model: Transformer,
    batches: Iterable[TokenBatch],
    keep: int,
    *,
    progress: Callable[[RemovalStep], object] | None = None,
) -> list[RemovalStep]:
    """Drops layers one at a time, each time the one whose loss hurts least, until ``keep`` are left.

    Args:
        model: Stays as it is.
        batches: Held-out calibration text. It stays in memory, with up to 1 GiB of hidden states.
        keep: Layers to be left, at least 1.
        progress: Called after each removal.

    Returns:
        The removals in order; the layers that none of them names are the ones to keep.
    """
    _check_keep(model.config.num_layers, keep)
    layers = list(range(model.config.num_layers))
    texts = [_Text(model, batch) for batch in batches]
    # All states of the first sweep: 1 + 2 + ... + num_layers times the texts' hidden states.
    num_bytes = sum(text.num_bytes for text in texts) * len(layers) * (len(layers) + 1) // 2
    stride = 1 + num_bytes // _STATE_BYTES
    steps: list[RemovalStep] = []
    removed_at = 0
    while len(layers) > keep:
        stack = [model.layers[index] for index in layers]
        losses = _mean_over_texts(text.losses_without_each(stack, removed_at, stride) for text in texts)
        removed_at = min(range(len(layers)), key=losses.__getitem__)
        steps.append(RemovalStep(layers.pop(removed_at), losses[removed_at]))
        if progress is not None:
            progress(steps[-1])
    return steps


class _Text:
    """One batch of calibration text and, for the current stack of layers, the inputs that its layers got.

    All candidate stacks advance together: those that have already skipped their layer go through the next one as one
    batch with the full stack, from which the next candidate branches off. So layer l runs for l + 1 stacks instead of
    for all. And since the layers below a removed one got the same inputs before and after the removal, the next sweep
    resumes there.
    """

    def __init__(self, model: Transformer, batch: TokenBatch) -> None:
        self._model, self._batch = model, batch
        full_BSD, self._rope = _embed(model, batch)
        self.num_bytes = full_BSD.nbytes
        # Position in the stack -> what the layer there gets: the stacks without layer 0, 1, ... and last the full one.
        self._inputs: dict[int, Tensor] = {0: full_BSD[None]}

    def losses_without_each(self, stack: Sequence[nn.Module], changed: int, stride: int) -> tuple[list[float], int]:
        """Summed loss of the stack without each of its layers, and the number of valid tokens.

        ``changed`` is the first position where the stack differs from the last call's; the inputs of every
        ``stride``-th position are kept.
        """
        start = max(position for position in self._inputs if position <= changed)
        state_CBSD = self._inputs[start]
        self._inputs = {position: state for position, state in self._inputs.items() if position <= start}
        for position in range(start, len(stack)):
            if position % stride == 0:
                self._inputs[position] = state_CBSD
            output_CBSD = _through(stack[position], state_CBSD.flatten(0, 1), self._rope).view_as(state_CBSD)
            state_CBSD = torch.cat((output_CBSD[:-1], state_CBSD[-1:], output_CBSD[-1:]))
        losses = [_summed_loss(self._model, hidden_BSD, self._batch) for hidden_BSD in state_CBSD[:-1]]
        return losses, int(_valid(self._batch).sum())


def _mean_over_texts(summed: Iterable[tuple[list[float], int]]) -> list[float]:
    summed = list(summed)
    count = _checked_count(sum(num_valid for _, num_valid in summed))
    return [sum(of_one) / count for of_one in zip(*(losses for losses, _ in summed), strict=True)]


def _check_keep(num_layers: int, keep: int) -> None:
    if not 1 <= keep <= num_layers:
        raise ConfigError(f"keep={keep}: must be from 1 to {num_layers}, the number of layers")


def _checked_count(num_valid: int) -> int:
    if num_valid == 0:
        raise ConfigError("calibration text: no valid label in it; at least one position must have a target")
    return num_valid


def _valid(batch: TokenBatch) -> Tensor:
    return batch.labels != IGNORE_INDEX


def _embed(model: Transformer, batch: TokenBatch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The first layer's input [B, S, D] and the rotary tables."""
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    hidden_BSD = model.tok_embeddings(batch.tokens)
    return hidden_BSD, model.rope(positions, hidden_BSD.dtype)


def _through(layer: nn.Module, hidden_BSD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """The layer's output, computed for so many sequences at a time that memory stays bounded."""
    rows = max(1, _TOKENS_AT_ONCE // hidden_BSD.shape[1])
    return torch.cat([layer(part, rope) for part in hidden_BSD.split(rows)])


def _summed_loss(model: Transformer, hidden_BSD: Tensor, batch: TokenBatch) -> float:
    """Cross entropy summed over valid tokens, from the last layer's output; the head runs at those tokens only."""
    valid = _valid(batch)
    hidden_ND, labels_N = hidden_BSD[valid], batch.labels[valid]
    rows = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    total = 0.0
    for part_ND, part_N in zip(hidden_ND.split(rows), labels_N.split(rows), strict=True):
        logits_NV = model.output(model.norm(part_ND)).float()
        total += functional.cross_entropy(logits_NV, part_N, reduction="sum").item()
    return total
