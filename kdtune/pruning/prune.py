"""Make small students from large models by dropping layers: measure the choice of layers and build the pruned model.

Shape suffixes: B batch, S sequence, C candidates (stacks without one layer), D embedding, N valid tokens,
V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdtune.constants import IGNORE_INDEX
from kdtune.errors import ConfigError
from kdtune.models.architecture import TransformerConfig
from kdtune.models.transformer import Transformer, on_meta_device

# Tokens that go through a layer at once, and logits that exist at once: they bound the measurements' memory.
_TOKENS_AT_ONCE = 4096
_LOGITS_AT_ONCE = 2**26


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
    """One layer that greedy removal dropped, and the loss without it and the earlier ones."""

    layer: int
    """Its index in the original model."""
    loss: float
    """Nats per valid token after the removal."""
    added: Mapping[int, float]
    """Loss increase of dropping each layer tried, by layer, before this removal."""


def keep_layers(model: Transformer, layers: Sequence[int]) -> Transformer:
    """Build a model of the given layers of ``model``, in order, that **shares** its weights.

    Nothing is copied, to save memory: training one of the two changes the other. Use ``copy.deepcopy`` if both are
    needed.

    Raises:
        ConfigError: The indices are not strictly increasing within the model.
    """
    check_layers(model, layers)
    with on_meta_device():
        pruned = Transformer(model.config.with_layers(layers))
    for name, module in model.named_children():
        setattr(pruned, name, module)
    pruned.layers = nn.ModuleList(model.layers[index] for index in layers)
    return pruned.train(model.training)


def architecture_problems(config: TransformerConfig) -> list[str]:
    """Return why layers of a model of this architecture cannot be left out; one sentence, or none."""
    if isinstance(config, TransformerConfig):
        return []
    return [
        f"checkpointer.family: {config.family} is computed by transformers, and only kdtune's own decoder is pruned; give a model of one "
        "of its families (docs/models.md)"
    ]


def check_layers(model: Transformer, layers: Sequence[int]) -> None:
    """Raise ConfigError unless the indices are strictly increasing within the model, at least one."""
    num_layers = model.config.num_layers
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= num_layers:
        raise ConfigError(
            f"layers={list(layers)}: must be strictly increasing indices from 0 to {num_layers - 1}, at least one"
        )


def evenly_spaced(num_layers: int, keep: int) -> list[int]:
    """Return ``keep`` of ``num_layers`` indices at equal distances, with the first and the last (for keep=1 the first).

    >>> evenly_spaced(30, 4)
    [0, 10, 19, 29]
    """
    _check_keep(num_layers, keep)
    if keep == 1:
        return [0]
    return [(2 * index * (num_layers - 1) + keep - 1) // (2 * (keep - 1)) for index in range(keep)]


def most_influential(influence: Sequence[float], keep: int) -> list[int]:
    """Return the ``keep`` indices of greatest influence, increasing; ShortGPT's choice given :func:`block_influence`.

    >>> most_influential([0.9, 0.1, 0.3, 0.5], keep=2)
    [0, 3]
    """
    _check_keep(len(influence), keep)
    return sorted(sorted(range(len(influence)), key=lambda index: -influence[index])[:keep])


@torch.no_grad()
def block_influence(model: Transformer, batches: Iterable[TokenBatch]) -> list[float]:
    """Return per layer 1 minus the mean cosine of its input and output over valid tokens (ShortGPT, arXiv 2403.03853).

    Near 0: the layer hardly changes the residual stream.
    """
    totals = torch.zeros(model.config.num_layers, dtype=torch.float64)
    count = 0
    for batch in batches:
        valid = _valid(batch)
        hidden_BSD, rope = model.embed(batch.tokens)
        for index, layer in enumerate(model.layers):
            output_BSD = _through(layer, hidden_BSD, rope)
            cosines_N = functional.cosine_similarity(hidden_BSD[valid].float(), output_BSD[valid].float(), dim=-1)
            totals[index] += cosines_N.cpu().double().sum()  # mps has no float64
            hidden_BSD = output_BSD
        count += int(valid.sum())
    return (1 - totals / _checked_count(count)).tolist()


@torch.no_grad()
def mean_loss(model: Transformer, batches: Iterable[TokenBatch], layers: Sequence[int] | None = None) -> float:
    """Return the cross entropy, in nats per valid token of the batches, of the model or of a stack of only the given layers."""
    stack = model.layers if layers is None else [model.layers[index] for index in layers]
    total, count = 0.0, 0
    for batch in batches:
        hidden_BSD, rope = model.embed(batch.tokens)
        for layer in stack:
            hidden_BSD = _through(layer, hidden_BSD, rope)
        total += _summed_loss(model, hidden_BSD, batch)
        count += int(_valid(batch).sum())
    return total / _checked_count(count)


@torch.no_grad()
def greedy_removal(
    model: Transformer,
    batches: Iterable[TokenBatch],
    keep: int,
    *,
    num_candidates: int | None = None,
    done: Sequence[RemovalStep] = (),
    on_removal: Callable[[RemovalStep], object] | None = None,
    on_progress: Callable[[float], object] | None = None,
) -> list[RemovalStep]:
    """Drop layers one at a time, each time the one whose removal raises the loss least, until ``keep`` are left.

    Args:
        model: Stays as it is.
        batches: Held-out calibration text. It stays in memory, with its hidden states before every layer.
        keep: Number of layers to keep, at least 1.
        num_candidates: After the first removal, measure only this many layers: those that added least to the loss when
            last measured. None: all of them, which is exact and takes several times as long.
        done: The first removals of an earlier call with these arguments (``keep`` may differ): they are not measured again.
        on_removal: Called after each new removal.
        on_progress: Called often, with the fraction of the current removal's measurements that are done, up to 1.

    Returns:
        The removals in order, beginning with ``done``; the layers that none of them names are the ones to keep.

    Raises:
        ConfigError: ``keep`` or ``num_candidates`` is out of range, or the text has no valid label.
    """
    _check_keep(model.config.num_layers, keep)
    if num_candidates is not None and num_candidates < 1:
        raise ConfigError(f"num_candidates={num_candidates}: must be at least 1, or null for all layers")
    batches = list(batches)
    texts = [_Text(model, batch) for batch in batches]
    steps = list(done)[: model.config.num_layers - keep]
    removed = [step.layer for step in steps]
    layers = [layer for layer in range(model.config.num_layers) if layer not in removed]
    # Loss increase of dropping each layer when last measured; all are measured first.
    added = dict.fromkeys(range(model.config.num_layers), 0.0)
    for step in steps:
        added |= step.added
    loss, removed_at = steps[-1].loss if steps else mean_loss(model, batches), 0
    while len(layers) > keep:
        tried = len(layers) if num_candidates is None or not steps else num_candidates
        candidates = sorted(sorted(range(len(layers)), key=lambda position: added[layers[position]])[:tried])
        stack = [model.layers[index] for index in layers]
        # Each candidate's stack goes through the layers above the one that it lacks, and the head.
        size = sum(text.size for text in texts) * sum(len(layers) - position for position in candidates)
        passed = _share_of(size, on_progress)
        losses = _mean_over_texts(text.losses_without(candidates, stack, removed_at, passed) for text in texts)
        measured = {layers[position]: without - loss for position, without in zip(candidates, losses, strict=True)}
        added |= measured
        loss, removed_at = min(zip(losses, candidates, strict=True))
        steps.append(RemovalStep(layers.pop(removed_at), loss, measured))
        if on_removal is not None:
            on_removal(steps[-1])
    return steps


def _share_of(size: int, tell: Callable[[float], object] | None) -> Callable[[int], None]:
    """Return a function that takes amounts of work as they are done and returns the fraction of the total done so far."""
    done = 0

    def add(amount: int) -> None:
        nonlocal done
        done += amount
        if tell is not None:
            tell(done / size)

    return add


class _Text:
    """One batch of calibration text, and the hidden states before each layer of the current stack.

    All candidate stacks advance together: those that have already skipped their layer go through the next one as one
    batch. Hidden states below a removed layer stay valid after the removal.
    """

    def __init__(self, model: Transformer, batch: TokenBatch) -> None:
        self._model, self._batch = model, batch
        hidden_BSD, self._rope = model.embed(batch.tokens)
        self._inputs = [hidden_BSD]
        self.size = batch.tokens.numel()

    def losses_without(
        self, candidates: Sequence[int], stack: Sequence[nn.Module], changed: int, passed: Callable[[int], object]
    ) -> tuple[list[float], int]:
        """Return each candidate's summed loss, of the stack without it, and the number of valid tokens.

        ``candidates`` are increasing positions in the stack. ``changed`` is the first position where the stack differs from
        the last call's. ``passed`` is called with the number of tokens that have passed a layer or the head.
        """
        del self._inputs[changed + 1 :]
        for layer in stack[len(self._inputs) - 1 : candidates[-1]]:
            self._inputs.append(_through(layer, self._inputs[-1], self._rope))
        skipped_CBSD = self._inputs[0][None][:0]
        for position in range(candidates[0], len(stack)):
            if len(skipped_CBSD):
                flat = _through(stack[position], skipped_CBSD.flatten(0, 1), self._rope)
                skipped_CBSD = flat.view_as(skipped_CBSD)
                passed(len(skipped_CBSD) * self.size)
            if position in candidates:
                skipped_CBSD = torch.cat((skipped_CBSD, self._inputs[position][None]))
        losses = []
        for hidden_BSD in skipped_CBSD:
            losses.append(_summed_loss(self._model, hidden_BSD, self._batch))
            passed(self.size)
        return losses, int(_valid(self._batch).sum())


def _mean_over_texts(summed: Iterable[tuple[list[float], int]]) -> list[float]:
    summed = list(summed)
    count = _checked_count(sum(num_valid for _, num_valid in summed))
    return [sum(of_one) / count for of_one in zip(*(losses for losses, _ in summed), strict=True)]


def _check_keep(num_layers: int, keep: int) -> None:
    if not 1 <= keep <= num_layers:
        raise ConfigError(f"num_layers to keep={keep}: must be from 1 to {num_layers}, the number of layers")


def _checked_count(num_valid: int) -> int:
    if num_valid == 0:
        raise ConfigError("calibration text: no valid label in it; at least one position must have a target")
    return num_valid


def _valid(batch: TokenBatch) -> Tensor:
    return batch.labels != IGNORE_INDEX


def _through(layer: nn.Module, hidden_BSD: Tensor, rope: tuple[Tensor, ...]) -> Tensor:
    """Return the layer's output, computed for a few sequences at a time to bound memory."""
    rows = max(1, _TOKENS_AT_ONCE // hidden_BSD.shape[1])
    return torch.cat([layer(part, rope) for part in hidden_BSD.split(rows)])


def _summed_loss(model: Transformer, hidden_BSD: Tensor, batch: TokenBatch) -> float:
    """Return the cross entropy summed over valid tokens, from the last layer's output; the head runs only at those tokens."""
    valid = _valid(batch)
    hidden_ND, labels_N = hidden_BSD[valid], batch.labels[valid]
    rows = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    total = 0.0
    for part_ND, part_N in zip(hidden_ND.split(rows), labels_N.split(rows), strict=True):
        logits_NV = model.output(model.norm(part_ND)).float()
        total += functional.cross_entropy(logits_NV, part_N, reduction="sum").item()
    return total
