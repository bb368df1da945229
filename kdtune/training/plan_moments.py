"""When in a step what exists on a rank, and what goes over the wire; docs/distributed.md says how the models are spread.

What FSDP2 holds and when was read from torch/distributed/fsdp/_fully_shard and is compared with what is measured in
tests/distributed/test_planned_memory.py. A unit is a layer, or the rest (embeddings, norm, head).

- Gathering a unit takes it twice: the buffer that is received, and the parameters that are copied out of it. In forward the
  buffer lives until the next unit is gathered; in backward the next one's is there already.
- The rest stays whole from its first use to the end of backward, the teacher's for good.
- A unit's gradients are whole until its backward ends; then reduce-scatter has a copy in its dtype, which lives until the next
  unit's backward ends.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from kdtune.training.meta_run import Cost
from kdtune.training.plan_costs import MicroBatch, hidden_bytes
from kdtune.training.plan_sizes import ModelSizes, Unit


@dataclass(frozen=True)
class Moment:
    """What exists on a rank's device at one point of a step, in bytes."""

    name: str
    weights: int = 0
    """This rank's share of student and teacher."""
    optimizer: int = 0
    gradients: int = 0
    """Its share of them, summed already."""
    gathered: int = 0
    """Parameters made whole for use, and the buffers they come in."""
    activations: int = 0
    loss: int = 0
    """What the loss makes, gradients of hidden states and head among it; in the optimizer's step what that makes."""
    reduction: int = 0
    """Gradients before they are summed, and the buffers they go in."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "name")


@dataclass(frozen=True)
class Volume:
    """Bytes that a rank receives in a step, as ring algorithms send them."""

    gather: int
    reduce_scatter: int
    all_reduce: int
    tensor_parallel: int
    """Sums of hidden states, two a layer and pass, and logits on their way to the process that compares them."""
    answers: int = 0
    """Hidden states from a teacher on processes of its own."""


@dataclass(frozen=True)
class Trained:
    """The model that is trained, what a layer takes, and what the final norm keeps; bytes."""

    sizes: ModelSizes
    layer: Cost
    norm: int
    hidden: int
    """One hidden state [B, S, D]."""
    fixed: int
    """What is there from the start: the embedded tokens, the rotary tables, the micro-batch itself."""
    recomputes: bool

    @property
    def kept(self) -> int:
        """Of a layer, until its backward."""
        return self.hidden if self.recomputes else self.layer.kept

    @property
    def layer_backward(self) -> int:
        """Most in a layer's backward, with what was kept of it."""
        return self.layer.backward_peak + (self.hidden if self.recomputes else 0)

    @property
    def activations(self) -> int:
        """Of all layers, after forward."""
        return self.fixed + self.sizes.num_layers * self.kept + self.norm


@dataclass(frozen=True)
class Taught:
    """The teacher, and what a layer of it takes; bytes."""

    sizes: ModelSizes
    layer: Cost
    hidden: int
    """Its answer to a micro-batch."""
    fixed: int
    apart: int = 0
    """Processes that hold it alone, while the student's have a copy of its head; 0: it is where the student is."""
    turns: int = 1
    """Forwards of one of its processes for a micro-batch of all of the student's."""

    @property
    def stored(self) -> int:
        """Its share, or its head, on a process of the student."""
        head = self.sizes.pieces.output.weight
        return head.numel() * head.element_size() if self.apart else self.sizes.total.stored

    @property
    def flops(self) -> int:
        """Floating-point operations of one of its processes for a micro-batch of all of the student's."""
        return self.turns * self.sizes.num_layers * self.layer.forward_flops


def moments(student: Trained, teacher: Taught | None, loss: Cost, accumulation: int, update: int) -> Iterator[Moment]:
    """The points of a step at which there may be most, from its second micro-batch or step on.

    Args:
        student: what is trained.
        teacher: what it learns from; None: the labels alone.
        loss: from hidden states.
        accumulation: micro-batches a step.
        update: bytes that the optimizer makes for a while.
    """
    held = _held(student, teacher, accumulation)
    if teacher is not None and not teacher.apart:
        yield from teacher_moments(teacher, held)
    yield from _forward(student, loss, held, answer=0 if teacher is None else teacher.hidden)
    yield from _backward(student, held)
    end = {**held, "gradients": _own(student.sizes, student.sizes.total.gradients)}
    yield Moment("the optimizer's step", **end, loss=update)


def _own(sizes: ModelSizes, share: int) -> int:
    """A rank's share, where it lies on the device."""
    return 0 if sizes.is_offloaded else share


def _buffer(sizes: ModelSizes, unit: Unit) -> int:
    """What a unit is received in."""
    return unit.whole if sizes.num_shards > 1 else 0


def _held(student: Trained, teacher: Taught | None, accumulation: int) -> dict[str, int]:
    """What exists throughout."""
    own = student.sizes.total
    held = {
        "weights": _own(student.sizes, own.stored),
        "optimizer": _own(student.sizes, own.state),
        "gradients": _own(student.sizes, own.gradients) if accumulation > 1 else 0,
        "gathered": 0,
    }
    if teacher is None:
        return held
    if teacher.apart:
        return {**held, "weights": held["weights"] + teacher.stored}
    return {name: size + teacher_held(teacher).get(name, 0) for name, size in held.items()}


def teacher_held(teacher: Taught) -> dict[str, int]:
    """What exists of it throughout, where it is."""
    sizes = teacher.sizes
    layers = 0 if sizes.reshards else sizes.num_layers * sizes.layer.whole
    return {"weights": _own(sizes, sizes.total.stored), "gathered": sizes.rest.whole + layers}


def teacher_moments(teacher: Taught, held: dict[str, int], *, unfetched: int = 0) -> Iterator[Moment]:
    """The points of its forward at which there may be most, beside what is held and an answer that is not fetched yet."""
    sizes = teacher.sizes
    layer, buffer = sizes.layer, _buffer(sizes, sizes.layer)
    first = sizes.rest.whole + _buffer(sizes, sizes.rest) + buffer
    yield Moment("the teacher's first use", weights=held["weights"], gathered=first)
    gathered = held["gathered"] + (layer.whole + buffer if sizes.reshards else 0)
    activations = unfetched + teacher.fixed + teacher.layer.forward_peak
    yield Moment("the teacher's forward", **{**held, "gathered": gathered}, activations=activations)


def _forward(student: Trained, loss: Cost, held: dict[str, int], *, answer: int) -> Iterator[Moment]:
    """The student's forward, and the loss; `answer`: what the teacher gave."""
    sizes = student.sizes
    layer, buffer = sizes.layer, _buffer(sizes, sizes.layer)
    first = held["gathered"] + sizes.rest.whole + _buffer(sizes, sizes.rest) + buffer
    yield Moment("the student's first use", **{**held, "gathered": first}, activations=answer)
    kept_whole = 0 if sizes.reshards else sizes.num_layers * layer.whole
    rest = held["gathered"] + sizes.rest.whole
    below = student.fixed + (sizes.num_layers - 1) * student.kept
    working = student.kept if student.recomputes else student.layer.forward_peak
    forward = {**held, "gathered": rest + max(kept_whole, layer.whole) + buffer}
    yield Moment("the student's forward", **forward, activations=answer + below + working)
    full = {**held, "gathered": rest + kept_whole}
    yield Moment("the loss", **full, activations=answer + student.activations, loss=loss.forward_peak)
    yield Moment("the loss's backward", **full, activations=student.activations, loss=loss.backward_peak)


def _backward(student: Trained, held: dict[str, int]) -> Iterator[Moment]:
    sizes, whole = student.sizes, student.sizes.is_sharded
    layer, count, buffer = sizes.layer, sizes.num_layers, _buffer(sizes, sizes.layer)
    is_first = held["gradients"] == 0
    # The head's gradient is there from the loss on: before it is summed, or as this process's own.
    head = _gradient_bytes(sizes, "output")
    embeddings = _gradient_bytes(sizes, "tok_embeddings")
    rest = held["gathered"] + sizes.rest.whole
    shard = -(-layer.reduced // max(1, sizes.num_shards))
    for name, index in (("last", count - 1), ("last but one", count - 2), ("first", 0)):
        if index < 0:
            continue
        done = count - 1 - index
        waiting = layer.reduced if done else 0
        own = _own(sizes, done * layer.gradients) if is_first else held["gradients"]
        pending = head
        if not whole:
            own, pending = own + (head if is_first else 0), 0 if is_first else head
        below = student.fixed + index * student.kept
        gathered = rest + (layer.whole + (buffer if index else 0) if sizes.reshards else (index + 1) * layer.whole)
        now = {**held, "gradients": own, "gathered": gathered}
        yield Moment(
            f"the backward of the {name} layer",
            **now,
            activations=below + student.layer_backward + student.hidden,
            reduction=pending + waiting,
        )
        if whole:
            now["gathered"] -= layer.whole
            sent = max(layer.whole_gradients + layer.reduced, layer.reduced + 2 * shard)
            yield Moment(
                f"the reduction of the {name} layer",
                **now,
                activations=below + student.hidden,
                reduction=pending + sent,
            )
    own = _own(sizes, count * layer.gradients) if is_first else held["gradients"]
    if not whole:
        # A tied head's gradient and the embeddings' are summed into one.
        own = own + head if is_first else own
        yield Moment(
            "the embeddings' backward", **{**held, "gradients": own}, activations=student.hidden, reduction=embeddings
        )
        return
    now = {**held, "gradients": own, "gathered": rest}
    waiting = layer.reduced + head + embeddings
    yield Moment("the embeddings' backward", **now, activations=student.hidden, reduction=waiting)
    shard = -(-sizes.rest.reduced // max(1, sizes.num_shards))
    sent = max(sizes.rest.whole_gradients + sizes.rest.reduced, sizes.rest.reduced + 2 * shard)
    yield Moment("the reduction of embeddings and head", **{**now, "gathered": held["gathered"]}, reduction=sent)


def _gradient_bytes(sizes: ModelSizes, name: str) -> int:
    """Of a module of the rest, before they are summed."""
    parameters = sizes.pieces.get_submodule(name).parameters()
    return sum(one.numel() * one.element_size() for one in parameters if one.requires_grad)


def volume(
    student: ModelSizes, teacher: Taught | None, accumulation: int, batch: MicroBatch, *, recomputes: bool
) -> Volume:
    """What a rank receives in a step; `teacher`: None where it is not asked."""
    gather = student.rest.whole + student.num_layers * student.layer.whole * (2 if student.reshards else 1)
    gathered = _ring(gather, student.num_shards)
    reduced = student.total.reduced
    replicas = student.layout[0] if student.is_sharded else 1
    summed = 2 * _ring(reduced // max(1, student.num_shards), replicas)
    cut = _cut_volume(student, batch, passes=3 if recomputes else 2, exchanges=2)
    answers = 0
    if teacher is not None and teacher.apart:
        answers = teacher.hidden
    elif teacher is not None:
        gathered += teacher_gather(teacher)
        cut += _cut_volume(teacher.sizes, batch, passes=1, exchanges=1)
    parts = (gathered, _ring(reduced, student.num_shards), summed, cut, answers)
    return Volume(*(accumulation * part for part in parts))


def teacher_gather(teacher: Taught) -> int:
    """Bytes that one of its processes receives of its weights for a micro-batch of all of the student's."""
    sizes = teacher.sizes
    return teacher.turns * _ring(sizes.num_layers * sizes.layer.whole, sizes.num_shards) if sizes.reshards else 0


def _cut_volume(sizes: ModelSizes, batch: MicroBatch, *, passes: int, exchanges: int) -> int:
    """What tensor parallelism sends of a micro-batch, in so many passes over the layers and exchanges of its logits."""
    tp = sizes.layout[-1]
    hidden = hidden_bytes(sizes.pieces, batch)
    logits = batch.num_tokens * len(sizes.pieces.output.weight) * torch.float32.itemsize
    # A sum is sent as two rings; of a process's logits, all but its own tokens' go to the others.
    return passes * 2 * sizes.num_layers * 2 * _ring(hidden, tp) + 2 * _ring(hidden, tp) + exchanges * _ring(logits, tp)


def _ring(total: int, ranks: int) -> int:
    """Bytes that each of so many ranks receives of a total that each has a share of."""
    return total * (ranks - 1) // ranks
