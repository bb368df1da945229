"""Log-probabilities of continuations; sequences with a common prefix share its computation.

Requests are packed into rows as trees: a token that several sequences have at the same position after the same tokens is
computed once, and a mask lets every token attend only to its own past. Four endings of one story cost the story once;
tasks with one long prompt before every question cost the prompt once per row.

Shape suffixes: B rows, S nodes of a row, D embedding, V vocabulary, U positions whose logits are needed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kdtune.distributed import SINGLE_PROCESS, World, parallel_map
from kdtune.errors import DataError
from kdtune.generation import eval_mode
from kdtune.models import Transformer, TransformerConfig

# A row takes no further sequence beyond so many tokens (or twice its first): attention costs the square of a row.
ROW_TOKENS = 1024
# A sequence joins a row if it shares at least this part of its tokens: less is not worth the larger mask.
_WORTH_SHARING = 0.25
# A row of a large batch fills at least this part of its place.
_LEAST_FILLED = 0.8
# Logits in memory at a time: 64 MiB in fp32.
_LOGITS_AT_A_TIME = 2**24

Pair = tuple[Sequence[int], Sequence[int]]
"""Ids of a context and of its continuation, at least one each."""


class Score(NamedTuple):
    """Log-probability of a continuation in nats, and whether each of its tokens is the most likely one."""

    logprob: float
    is_greedy: bool


@dataclass
class _Row:
    """A tree of tokens. A request's path is the nodes of its input; its continuation is scored at the last of them."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    paths: list[tuple[int, list[int]]] = field(default_factory=list)

    def add(self, request: int, inputs: Sequence[int], shared: int) -> None:
        """Insert a request's inputs into the tree; the first `shared` of them are those of the previous request."""
        kept = self.paths[-1][1][:shared] if self.paths else []
        new = range(len(self.tokens), len(self.tokens) + len(inputs) - shared)
        self.tokens += inputs[shared:]
        self.positions += range(shared, len(inputs))
        self.paths.append((request, [*kept, *new]))

    @property
    def is_causal(self) -> bool:
        """Return whether every node follows the one before it, so that no mask is needed."""
        return self.positions == list(range(len(self.positions)))


def score(
    model: Transformer,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    batch_tokens: int,
    on_scored: Callable[[int], object] | None = None,
    world: World = SINGLE_PROCESS,
) -> list[Score]:
    """Return the score of each continuation after its context, in the order of the pairs.

    Only positions that predict a continuation go through the output head, a chunk at a time; softmax and sums are in
    fp32 and float64. If context and continuation are longer than `max_length` + 1, the context is truncated on the left
    (the last token is only predicted). The result does not depend on batch_tokens, apart from rounding.

    Args:
        model: on any device; its mode is restored.
        pairs: token ids of contexts and continuations.
        max_length: longest input of the model, in tokens.
        batch_tokens: tokens a forward pass, padding included; a single row may be longer.
        on_scored: called with the number of requests that are finished.
        world: the processes that share the work, all of which call this with the same pairs: the batches are those of a
            single process, and every process gets all scores.

    Raises:
        DataError: a context or continuation is empty, or a continuation alone is longer than max_length.
    """
    inputs = [_inputs(pair, max_length) for pair in pairs]
    continuations = [pair[1] for pair in pairs]

    def count(batches: Sequence[list[_Row]]) -> None:
        if on_scored:
            on_scored(sum(len(row.paths) for rows in batches for row in rows))

    with eval_mode(model):
        scored = parallel_map(
            lambda rows: _score_rows(model, rows, continuations),
            list(_batches(_rows(inputs, model.config), batch_tokens)), model, world, on_done=count,
        )  # fmt: skip
    results = dict(pair for of_batch in scored for pair in of_batch)
    return [results[request] for request in range(len(pairs))]


def _inputs(pair: Pair, max_length: int) -> list[int]:
    context, continuation = pair
    if not context or not continuation:
        raise DataError(
            f"a request has {len(context)} context and {len(continuation)} continuation tokens; at least 1 each is "
            "needed: look for empty texts in the task's documents"
        )
    if len(continuation) > max_length:
        raise DataError(
            f"a continuation has {len(continuation)} tokens; max_seq_length={max_length} must hold at least that many"
        )
    return [*context, *continuation][-(max_length + 1) : -1]


def _rows(inputs: Sequence[list[int]], config: TransformerConfig) -> list[_Row]:
    """Pack the requests into rows, in lexical order, so that common prefixes are adjacent; where the model allows it."""
    alone = [_Row() for _ in inputs]
    for request, (row, sequence) in enumerate(zip(alone, inputs, strict=True)):
        row.add(request, sequence, 0)
    rows = []
    for shared in _shared_rows(inputs):
        rows += [shared] if _may_share(shared, config) else [alone[request] for request, _ in shared.paths]
    return rows


def _may_share(row: _Row, config: TransformerConfig) -> bool:
    """Return whether the model computes for a node of the tree what it computes for that token of each sequence by itself."""
    # A window counts the tokens of a row, whichever sequence they are of.
    window = min((size for size in config.windows if size), default=None)
    if window is not None and window < len(row.tokens) and not row.is_causal:
        return False
    # With LongRoPE a token depends on the length of its text.
    return len({len(path) > config.rope_switch for _, path in row.paths} if config.rope_switch else {False}) == 1


def _shared_rows(inputs: Sequence[list[int]]) -> list[_Row]:
    rows: list[_Row] = []
    room = 0
    before: Sequence[int] = []
    for request in sorted(range(len(inputs)), key=lambda index: inputs[index]):
        sequence = inputs[request]
        shared = _common_prefix(before, sequence)
        num_new = len(sequence) - shared
        fits = rows and len(rows[-1].tokens) + num_new <= room and shared >= _WORTH_SHARING * len(sequence)
        if not fits and not (rows and num_new == 0):
            rows.append(_Row())
            room, shared = max(ROW_TOKENS, 2 * len(sequence)), 0
        rows[-1].add(request, sequence, shared)
        before = sequence
    return rows


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _batches(rows: list[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """Batch the rows by length, longest first, as many at a time as fit when padded to the longest of them.

    A batch that is large enough to keep a device busy ends before rows so short that they would be mostly padding.
    """
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batch:
            longest = len(batch[0].tokens)
            is_full = (len(batch) + 1) * longest > batch_tokens
            if is_full or (len(batch) * longest >= ROW_TOKENS and len(row.tokens) < _LEAST_FILLED * longest):
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch


def _score_rows(
    model: Transformer, rows: list[_Row], continuations: Sequence[Sequence[int]]
) -> list[tuple[int, Score]]:
    device = model.device
    length = max(len(row.tokens) for row in rows)
    tokens_BS = _padded([row.tokens for row in rows], length).to(device)
    positions_BS = _padded([row.positions for row in rows], length).to(device)
    mask = None if all(row.is_causal for row in rows) else _tree_mask(rows, length).to(device)
    hidden_BSD = model(tokens_BS, input_pos=positions_BS, mask=mask, return_hidden=True)
    nodes: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for number, row in enumerate(rows):
        for request, path in row.paths:
            targets += continuations[request]
            nodes += [number * length + node for node in path[-len(continuations[request]) :]]
            owners.append(request)
    logprobs, hits = _look_up(model, hidden_BSD.flatten(0, 1), nodes, targets)
    scored, start = [], 0
    for request in owners:
        end = start + len(continuations[request])
        scored.append((request, Score(float(logprobs[start:end].sum()), bool(hits[start:end].all()))))
        start = end
    return scored


def _padded(rows: list[list[int]], length: int) -> Tensor:
    padded = torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.tensor(row)
    return padded


def _tree_mask(rows: list[_Row], length: int) -> Tensor:
    """Return a bool mask [B, S, S], True where a node may attend to another: itself and the nodes before it on its path."""
    mask = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    for number, row in enumerate(rows):
        for _, path in row.paths:
            nodes = torch.tensor(path)
            mask[number, nodes[:, None], nodes] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
    return mask


def _look_up(model: Transformer, hidden_ND: Tensor, nodes: list[int], targets: list[int]) -> tuple[Tensor, Tensor]:
    """Return for each (node, target) the target's log-probability (float64, CPU), and whether it is the most likely token."""
    unique, index = torch.unique(torch.tensor(nodes), return_inverse=True)
    wanted = torch.tensor(targets)
    logprobs = torch.empty(len(targets), dtype=torch.float64)
    hits = torch.empty(len(targets), dtype=torch.bool)
    chunk = max(1, _LOGITS_AT_A_TIME // model.config.vocab_size)
    hidden_UD = hidden_ND[unique.to(hidden_ND.device)]
    for start in range(0, len(unique), chunk):
        logits_UV = model.output(hidden_UD[start : start + chunk]).float()
        inside = ((index >= start) & (index < start + chunk)).nonzero().squeeze(1)
        rows, columns = (index[inside] - start).to(logits_UV.device), wanted[inside].to(logits_UV.device)
        found = logits_UV[rows, columns] - logits_UV.logsumexp(dim=-1)[rows]
        logprobs[inside] = found.cpu().double()
        hits[inside] = (logits_UV.argmax(dim=-1)[rows] == columns).cpu()
    return logprobs, hits
