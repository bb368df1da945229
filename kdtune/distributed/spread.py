"""Work without gradients that the processes share: each does its part of a list, and all of them get every result."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from kdtune.distributed.world import World

Item = TypeVar("Item")
Result = TypeVar("Result")

# Items that a process works on before the others' results are fetched: one that is slower falls back no further than this,
# and is not taken for one that hangs.
_ITEMS_AT_A_TIME = 16


def spread(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    model: nn.Module,
    world: World | None,
    *,
    on_done: Callable[[Sequence[Item]], object] | None = None,
    on_result: Callable[[Item, Result], object] | None = None,
) -> list[Result]:
    """`work(item)` of each item, in the order of the items, on every process; all of them call it with the same items.

    Item i is worked on by process i modulo their number (with tp, by a group).
    Items that begin with the largest keep the processes busy alike.

    Args:
        work: calls the model as often as it likes, under `torch.no_grad()`; what it returns is pickled.
        items: what there is to do.
        model: what `work` uses; where it is sharded, the processes' forwards go in step (`in_step`).
        world: the processes; None: this one alone.
        on_done: called with the items of a round, one a process, when this process has done its own. For progress bars.
        on_result: called with each item and its result as soon as this process has it: its own at once, the others' when they
            are fetched, after a few of its own. For keeping what there is.
    """
    rank, size = (world.dp_rank, world.dp_size) if world else (0, 1)
    found: list[Result] = []
    for start in range(0, len(items), size * _ITEMS_AT_A_TIME):
        part = items[start : start + size * _ITEMS_AT_A_TIME]
        own = []
        with in_step(model, world):
            for first in range(0, len(part), size):
                for item in part[first + rank : first + rank + 1]:
                    own.append(work(item))
                    if on_result:
                        on_result(item, own[-1])
                if on_done:
                    on_done(part[first : first + size])
        shares = world.gather(own)[:: world.tp] if world else [own]
        for index, item in enumerate(part):
            found.append(shares[index % size][index // size])
            if on_result and index % size != rank:
                on_result(item, found[-1])
    return found


def spread_in_batches(
    work: Callable[[list[int]], Sequence[Result]],
    lengths: Sequence[int],
    batch_size: int,
    model: nn.Module,
    world: World | None,
    *,
    groups: Sequence[Hashable] | None = None,
    on_done: Callable[[int], object] | None = None,
    on_result: Callable[[int, Result], object] | None = None,
) -> list[Result]:
    """A result for each of so many sequences, in their order, on every process; see `spread`.

    Args:
        work: results for the sequences of these numbers, which are computed side by side.
        lengths: of the sequences. Those of similar length go together, so that little of a batch is padding.
        batch_size: the most sequences in a batch.
        model: what `work` uses.
        world: the processes; None: this one alone.
        groups: of each sequence, what those in its batch have in common; None: any may share one.
        on_done: called with the number of sequences that a round has done. For progress bars.
        on_result: called with a sequence's number and its result as soon as this process has it, see `spread`.
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

    found = spread(work, batches, model, world, on_done=count, on_result=tell)
    results = dict(zip(chain.from_iterable(batches), chain.from_iterable(found), strict=True))
    return [results[index] for index in range(len(lengths))]


@contextmanager
def in_step(model: nn.Module, world: World | None) -> Iterator[None]:
    """Inside, the processes may call a sharded model differently often; any other model is left alone.

    FSDP fetches a layer's weights from all processes together, so that a forward of one is a forward of all: before each, they
    tell each other that they make one, and a process that leaves makes empty ones until all have left. On entry, the embeddings,
    norm and head are made whole, on the device that computes.
    """
    if world is None or not isinstance(model, FSDPModule):
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
