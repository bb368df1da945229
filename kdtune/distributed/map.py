"""Parallel map without gradients: each process computes a part of a list, and all of them get every result."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch
from torch import nn

from kdtune.distributed.world import World
from kdtune.tensor_types import is_fsdp_module

Item = TypeVar("Item")
Result = TypeVar("Result")

# Items that a process works on before the others' results are fetched: one that is slower falls back no further than this,
# and is not taken for one that hangs.
_ITEMS_AT_A_TIME = 16


def parallel_map(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    model: nn.Module,
    world: World,
    *,
    on_done: Callable[[Sequence[Item]], object] | None = None,
    on_result: Callable[[Item, Result], object] | None = None,
) -> list[Result]:
    """Return `work(item)` for each item, in order, on every process; all processes call it with the same items.

    Process i modulo the number of processes computes item i (with tp, a group does). Put the largest items first to balance
    the load.

    Args:
        work: may call the model any number of times, under `torch.no_grad()`; its result is pickled.
        items: inputs of `work`.
        model: the model that `work` uses; if it is sharded, the processes' forwards run in lockstep (`lockstep_forwards`).
        world: the processes.
        on_done: called with the items of a round, one per process, when this process has done its own. For progress bars.
        on_result: called with each item and its result as soon as this process has it: its own at once, the others' when
            they are fetched, after a few of its own. For saving partial results.
    """
    rank, size = world.dp_rank, world.dp_size
    found: list[Result] = []
    for start in range(0, len(items), size * _ITEMS_AT_A_TIME):
        part = items[start : start + size * _ITEMS_AT_A_TIME]
        own = []
        with lockstep_forwards(model, world):
            for first in range(0, len(part), size):
                for item in part[first + rank : first + rank + 1]:
                    own.append(work(item))
                    if on_result:
                        on_result(item, own[-1])
                if on_done:
                    on_done(part[first : first + size])
        shares = world.gather(own)[:: world.tp]
        for index, item in enumerate(part):
            found.append(shares[index % size][index // size])
            if on_result and index % size != rank:
                on_result(item, found[-1])
    return found


def parallel_map_batched(
    work: Callable[[list[int]], Sequence[Result]],
    lengths: Sequence[int],
    batch_size: int,
    model: nn.Module,
    world: World,
    *,
    groups: Sequence[Hashable] | None = None,
    on_done: Callable[[int], object] | None = None,
    on_result: Callable[[int, Result], object] | None = None,
) -> list[Result]:
    """Return a result for each sequence, in order, on every process; like `parallel_map`, but `work` gets batches.

    Args:
        work: returns the results for a batch, given the indices of its sequences.
        lengths: lengths of the sequences. Sequences of similar length are batched together to save padding.
        batch_size: largest number of sequences in a batch.
        model: the model that `work` uses.
        world: the processes.
        groups: a key for each sequence; only sequences with equal keys share a batch. None: any may.
        on_done: called with the number of sequences that a round has done. For progress bars.
        on_result: called with a sequence's index and its result as soon as this process has it, see `parallel_map`.
    """
    groups = groups or [None] * len(lengths)
    batches: list[list[int]] = []
    for group in dict.fromkeys(groups):
        members = [index for index, own in enumerate(groups) if own == group]
        members.sort(key=lambda index: -lengths[index])
        batches += [members[start : start + batch_size] for start in range(0, len(members), batch_size)]

    def count(done: Sequence[list[int]]) -> None:
        if on_done:
            on_done(sum(map(len, done)))

    def tell(batch: list[int], results: Sequence[Result]) -> None:
        for index, result in sorted(zip(batch, results, strict=True), key=lambda pair: pair[0]):
            if on_result:
                on_result(index, result)

    found = parallel_map(work, batches, model, world, on_done=count, on_result=tell)
    results = dict(zip(chain.from_iterable(batches), chain.from_iterable(found), strict=True))
    return [results[index] for index in range(len(lengths))]


@contextmanager
def lockstep_forwards(model: nn.Module, world: World) -> Iterator[None]:
    """A context in which ranks may run different numbers of forward passes of a sharded model; no effect on other models.

    FSDP all-gathers a layer's weights, which takes all ranks, so a forward on one rank must be a forward on all. Before each
    one the ranks announce it to each other, and a rank that leaves runs empty forwards until all have left. On entry, the
    embeddings, norm and head are all-gathered to the compute device.
    """
    if not is_fsdp_module(model):
        yield
        return
    model.unshard()

    def announce(*_: object) -> None:
        world.any(True)

    # Before FSDP's own hook, which fetches.
    hook = model.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    with torch.no_grad():
        while world.any(False):
            model(torch.zeros(1, 1, dtype=torch.int64, device=world.device), return_hidden=True)
