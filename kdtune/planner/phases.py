"""Memory of a rank in each phase of a step, and its communication volume; docs/distributed.md describes the parallelism.

The behaviour of FSDP2 was read from torch/distributed/fsdp/_fully_shard and is compared with measurements in
tests/distributed/test_planned_memory.py. A unit is a layer, or the rest (embeddings, norm, head: FSDP's root).

- All-gathering a unit needs its size twice: the receive buffer, and the parameters that are copied out of it. In forward the
  buffer lives until the next unit is gathered; in backward the next unit's buffer already exists.
- The rest stays unsharded from its first use to the end of backward; the teacher's is never resharded.
- A unit's gradients are unsharded until its backward ends; then reduce-scatter has a copy in its dtype, which lives until the
  next unit's backward ends.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch

from kdtune.parallel import Checkpointed
from kdtune.planner.costs import MicroBatch, hidden_bytes
from kdtune.planner.meta_device import Cost
from kdtune.planner.sizes import FSDPUnit, ModelSizes
from kdtune.planner.writing import Writing


@dataclass(frozen=True)
class Phase:
    """Bytes on a rank's device in one phase of a step, by purpose."""

    name: str
    weights: int = 0
    """This rank's shards of student and teacher."""
    optimizer: int = 0
    gradients: int = 0
    """This rank's shards of the gradients, already reduced."""
    gathered: int = 0
    """All-gathered parameters, and their receive buffers."""
    activations: int = 0
    loss: int = 0
    """Temporaries of the loss, including gradients of hidden states and head; in the optimizer's step, its temporaries."""
    reduction: int = 0
    """Gradients before they are reduced, and the reduce-scatter buffers."""
    cache: int = 0
    """Keys and values of texts that are written."""

    @property
    def total(self) -> int:
        """Sum of all fields."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "name")


@dataclass(frozen=True)
class CommVolume:
    """Bytes that a rank receives in a step, with ring algorithms."""

    gather: int
    reduce_scatter: int
    all_reduce: int
    tensor_parallel: int
    """All-reduces of hidden states, two per layer and pass, and the all-to-all of logits for the loss."""
    answers: int = 0
    """Hidden states from a teacher elsewhere."""


@dataclass(frozen=True)
class SavedActivations:
    """What the layers save for backward under `activation_checkpointing` and `activation_offloading`."""

    checkpointed: Checkpointed | None = None
    recomputed: int = 0
    """Bytes that a layer whose activations are recomputed saves on the device."""
    offloaded: int | None = None
    """Bytes that another layer moves to the CPU; None: none are moved."""
    offloaded_recomputed: int = 0
    """Bytes that a layer whose activations are recomputed moves to the CPU."""

    def num_recomputed(self, num_layers: int) -> int:
        """Return how many of the first layers are recomputed."""
        every = self.checkpointed if isinstance(self.checkpointed, int) else 1
        return -(-num_layers // every) if self.checkpointed else 0

    def on_device(self, num_layers: int, kept: int) -> int:
        """Return the bytes that the first layers save on the device; `kept`: of one that is neither recomputed nor moved."""
        again = self.num_recomputed(num_layers)
        return again * self.recomputed + (num_layers - again) * (kept - (self.offloaded or 0))

    def on_host(self, num_layers: int) -> int:
        """Return the bytes that the first layers move to the CPU."""
        again = self.num_recomputed(num_layers)
        return again * self.offloaded_recomputed + (num_layers - again) * (self.offloaded or 0)


@dataclass(frozen=True)
class StudentCost:
    """Costs of the trained model: sizes, one layer, and the final norm's saved tensors; bytes."""

    sizes: ModelSizes
    layer: Cost
    norm: int
    hidden: int
    """One hidden state [B, S, D]."""
    fixed: int
    """Allocated from the start: the embedded tokens, the rotary tables, the micro-batch itself."""
    saved: SavedActivations
    updates_in_backward: bool = False

    def kept_by(self, num_layers: int) -> int:
        """Return the bytes that the first layers have saved until their backward."""
        return self.saved.on_device(num_layers, self.layer.kept)

    @property
    def layer_backward(self) -> int:
        """Peak bytes in a layer's backward, including its saved tensors."""
        return self.layer.backward_peak + (self.hidden if self.saved.checkpointed else 0)

    @property
    def activations(self) -> int:
        """Bytes that all layers have saved after forward."""
        return self.fixed + self.kept_by(self.sizes.num_layers) + self.norm


@dataclass(frozen=True)
class TeacherCost:
    """Costs of the teacher: sizes and one layer; bytes."""

    sizes: ModelSizes
    layer: Cost
    hidden: int
    """Its output for a micro-batch."""
    fixed: int
    num_ranks: int = 0
    """Number of ranks that hold only the teacher; 0: it is colocated."""
    rounds: int = 1
    """Forwards of one of its ranks for one micro-batch of every student rank."""
    is_elsewhere: bool = False
    """True if it is on other devices than the student, which then has a copy of its head."""
    is_offloaded: bool = False
    """True if its layers are in CPU memory; two of them have room on the device."""
    overlaps: bool = False
    """True if it computes beside the student, in memory of its own."""

    @property
    def stored(self) -> int:
        """Its shards, or its head, on the device of the student."""
        head = self.sizes.pieces.output.weight
        return head.numel() * head.element_size() if self.is_elsewhere else self.on_device

    @property
    def on_device(self) -> int:
        """Its shards on the device that computes it."""
        layers = min(2, self.sizes.num_layers) if self.is_offloaded else self.sizes.num_layers
        return _own(self.sizes, self.sizes.rest.plus(self.sizes.layer, layers).stored)

    @property
    def on_host(self) -> int:
        """Its shards in CPU memory."""
        if self.is_offloaded:
            return self.sizes.num_layers * self.sizes.layer.stored
        return self.sizes.total.stored if self.sizes.is_offloaded else 0

    @property
    def working(self) -> int:
        """Bytes of its forward."""
        return self.fixed + self.layer.forward_peak

    @property
    def flops(self) -> int:
        """Floating-point operations of one of its ranks for one micro-batch of every student rank."""
        return self.rounds * self.sizes.num_layers * self.layer.forward_flops


def phases(
    student: StudentCost, teacher: TeacherCost | None, loss: Cost, accumulation: int, update: int, kept_by_loss: int = 0
) -> Iterator[Phase]:
    """Return the phases of a step that may be its peak, from its second micro-batch or step on.

    Args:
        student: the trained model.
        teacher: the teacher; None: only labels.
        loss: cost of the loss from hidden states.
        accumulation: micro-batches per step.
        update: bytes of the optimizer's temporaries.
        kept_by_loss: bytes of `loss` that are not freed between its calls.
    """
    held = {**_held(student, teacher, accumulation), "loss": kept_by_loss}
    beside = 0
    if teacher is not None and not teacher.is_elsewhere:
        yield from teacher_phases(teacher, held)
        beside = teacher.working if teacher.overlaps else 0
    for phase in _student_phases(student, teacher, loss, held, kept_by_loss + update):
        # CUDA's allocator keeps what one stream has freed for that stream.
        yield replace(phase, activations=phase.activations + beside)


def _student_phases(
    student: StudentCost, teacher: TeacherCost | None, loss: Cost, held: dict[str, int], in_update: int
) -> Iterator[Phase]:
    yield from _forward(student, loss, held, answer=0 if teacher is None else teacher.hidden)
    yield from _backward(student, held)
    gradients = _own(student.sizes, student.sizes.total.gradients)
    if student.updates_in_backward:  # one gradient at a time, of which that of the embeddings is the largest
        gradients = max(_gradient_bytes(student.sizes, name) for name in ("output", "tok_embeddings"))
        gradients //= max(1, student.sizes.num_shards)
    yield Phase("the optimizer's step", **{**held, "gradients": gradients, "loss": in_update})


def _own(sizes: ModelSizes, share: int) -> int:
    """Return a rank's share if it is on the device, 0 if it is offloaded."""
    return 0 if sizes.is_offloaded else share


def _buffer(sizes: ModelSizes, unit: FSDPUnit) -> int:
    """Return the bytes of a unit's all-gather buffer."""
    return unit.whole if sizes.num_shards > 1 else 0


def _held(student: StudentCost, teacher: TeacherCost | None, accumulation: int) -> dict[str, int]:
    """Return the bytes allocated throughout a step, by purpose."""
    own = student.sizes.total
    held = {
        "weights": _own(student.sizes, own.stored),
        "optimizer": _own(student.sizes, own.state),
        "gradients": _own(student.sizes, own.gradients) if accumulation > 1 else 0,
        "gathered": 0,
    }
    if teacher is None:
        return held
    if teacher.is_elsewhere:
        return {**held, "weights": held["weights"] + teacher.stored}
    return {name: size + teacher_held(teacher).get(name, 0) for name, size in held.items()}


def teacher_held(teacher: TeacherCost) -> dict[str, int]:
    """Return the bytes allocated throughout a step on the ranks that compute the teacher, by purpose."""
    sizes = teacher.sizes
    layers = 0 if sizes.reshards else sizes.num_layers * sizes.layer.whole
    return {"weights": teacher.on_device, "gathered": sizes.rest.whole + layers}


def teacher_phases(teacher: TeacherCost, held: dict[str, int], *, unfetched: int = 0) -> Iterator[Phase]:
    """Return the phases of its forward that may be its peak, besides `teacher_held` and an output not yet fetched."""
    sizes = teacher.sizes
    layer, buffer = sizes.layer, _buffer(sizes, sizes.layer)
    first = sizes.rest.whole + _buffer(sizes, sizes.rest) + buffer
    yield Phase("the teacher's first use", weights=held["weights"], gathered=first)
    gathered = held["gathered"] + (layer.whole + buffer if sizes.reshards else 0)
    yield Phase("the teacher's forward", **{**held, "gathered": gathered}, activations=unfetched + teacher.working)


def writing_phases(student: StudentCost, teacher: TeacherCost | None, needed: Mapping[str, Writing]) -> Iterator[Phase]:
    """Return the phase in which models write a step's texts, while there are no gradients; none if none writes.

    `needed`: what each of "student" and "teacher" needs that writes on the student's device.
    """
    if not needed:
        return
    held, gathered = _held(student, teacher, 1), 0
    if "student" in needed:
        layer, count = student.sizes.layer, 1 if student.sizes.reshards else student.sizes.num_layers
        gathered = student.sizes.rest.whole + count * layer.whole + _buffer(student.sizes, layer)
    if "teacher" in needed and teacher is not None and teacher.sizes.reshards:
        # Where both write, every process has whole models.
        gathered = max(gathered, teacher.sizes.layer.whole + _buffer(teacher.sizes, teacher.sizes.layer))
    held["gathered"] += gathered
    working = max(one.working for one in needed.values())
    yield Phase(
        "the writing of the texts", **held, activations=working, cache=sum(one.cache for one in needed.values())
    )


def _forward(student: StudentCost, loss: Cost, held: dict[str, int], *, answer: int) -> Iterator[Phase]:
    """Yield the phases of the student's forward and the loss; `answer`: bytes of the teacher's output."""
    sizes = student.sizes
    layer, buffer = sizes.layer, _buffer(sizes, sizes.layer)
    first = held["gathered"] + sizes.rest.whole + _buffer(sizes, sizes.rest) + buffer
    yield Phase("the student's first use", **{**held, "gathered": first}, activations=answer)
    kept_whole = 0 if sizes.reshards else sizes.num_layers * layer.whole
    rest = held["gathered"] + sizes.rest.whole
    below = student.fixed + student.kept_by(sizes.num_layers - 1)
    working = student.saved.recomputed if student.saved.checkpointed == "full" else student.layer.forward_peak
    forward = {**held, "gathered": rest + max(kept_whole, layer.whole) + buffer}
    yield Phase("the student's forward", **forward, activations=answer + below + working)
    full = {**held, "gathered": rest + kept_whole}
    yield Phase("the loss", **{**full, "loss": loss.forward_peak}, activations=answer + student.activations)
    backward = {**full, "loss": held["loss"] + loss.backward_peak}
    yield Phase("the loss's backward", **backward, activations=student.activations)


def _backward(student: StudentCost, held: dict[str, int]) -> Iterator[Phase]:
    sizes, whole = student.sizes, student.sizes.is_sharded
    layer, count, buffer = sizes.layer, sizes.num_layers, _buffer(sizes, sizes.layer)
    is_first = held["gradients"] == 0
    # The head's gradient exists from the loss on: unreduced, or as this process's own.
    head = _gradient_bytes(sizes, "output")
    # Updated in backward, gradients of layers are gone when the next layer's come, and so is an untied head's.
    layer_gradients = 0 if student.updates_in_backward else layer.gradients
    if student.updates_in_backward and not whole and not sizes.pieces.config.tie_embeddings:
        head = 0
    embeddings = _gradient_bytes(sizes, "tok_embeddings")
    rest = held["gathered"] + sizes.rest.whole
    shard = -(-layer.reduced // max(1, sizes.num_shards))
    for name, index in (("last", count - 1), ("last but one", count - 2), ("first", 0)):
        if index < 0:
            continue
        done = count - 1 - index
        waiting = layer.reduced if done else 0
        own = _own(sizes, done * layer_gradients) if is_first else held["gradients"]
        pending = head
        if not whole:
            own, pending = own + (head if is_first else 0), 0 if is_first else head
        below = student.fixed + student.kept_by(index)
        gathered = rest + (layer.whole + (buffer if index else 0) if sizes.reshards else (index + 1) * layer.whole)
        now = {**held, "gradients": own, "gathered": gathered}
        yield Phase(
            f"the backward of the {name} layer",
            **now,
            activations=below + student.layer_backward + student.hidden,
            reduction=pending + waiting,
        )
        if whole:
            now["gathered"] -= layer.whole
            sent = max(layer.whole_gradients + layer.reduced, layer.reduced + 2 * shard)
            yield Phase(
                f"the reduction of the {name} layer",
                **now,
                activations=below + student.hidden,
                reduction=pending + sent,
            )
    own = _own(sizes, count * layer_gradients) if is_first else held["gradients"]
    if not whole:
        # A tied head's gradient and the embeddings' are summed into one.
        own = own + head if is_first else own
        yield Phase(
            "the embeddings' backward", **{**held, "gradients": own}, activations=student.hidden, reduction=embeddings
        )
        return
    now = {**held, "gradients": own, "gathered": rest}
    waiting = layer.reduced + head + embeddings
    yield Phase("the embeddings' backward", **now, activations=student.hidden, reduction=waiting)
    shard = -(-sizes.rest.reduced // max(1, sizes.num_shards))
    sent = max(sizes.rest.whole_gradients + sizes.rest.reduced, sizes.rest.reduced + 2 * shard)
    yield Phase("the reduction of embeddings and head", **{**now, "gathered": held["gathered"]}, reduction=sent)


def _gradient_bytes(sizes: ModelSizes, name: str) -> int:
    """Return the bytes of the unreduced gradients of a module of the rest."""
    parameters = sizes.pieces.get_submodule(name).parameters()
    return sum(one.numel() * one.element_size() for one in parameters if one.requires_grad)


def volume(
    student: ModelSizes, teacher: TeacherCost | None, accumulation: int, batch: MicroBatch, *, recomputed: float
) -> CommVolume:
    """Return the bytes that a rank receives in a step; `teacher`: None if it is not used; `recomputed`: share of the layers."""
    gather = student.rest.whole + student.num_layers * student.layer.whole * (2 if student.reshards else 1)
    gathered = _ring(gather, student.num_shards)
    reduced = student.total.reduced
    replicas = student.layout[0] if student.is_sharded else 1
    summed = 2 * _ring(reduced // max(1, student.num_shards), replicas)
    cut = _cut_volume(student, batch, passes=2 + recomputed, exchanges=2)
    answers = 0
    if teacher is not None and teacher.is_elsewhere:
        answers = teacher.hidden
    elif teacher is not None:
        gathered += teacher_gather(teacher)
        cut += _cut_volume(teacher.sizes, batch, passes=1, exchanges=1)
    parts = (gathered, _ring(reduced, student.num_shards), summed, cut, answers)
    return CommVolume(*(accumulation * part for part in parts))


def teacher_gather(teacher: TeacherCost) -> int:
    """Return the bytes of weights that one of its ranks receives for one micro-batch of every student rank."""
    sizes = teacher.sizes
    return teacher.rounds * _ring(sizes.num_layers * sizes.layer.whole, sizes.num_shards) if sizes.reshards else 0


def _cut_volume(sizes: ModelSizes, batch: MicroBatch, *, passes: float, exchanges: int) -> int:
    """Return the bytes of tensor parallelism for a micro-batch, given the passes over the layers and exchanges of logits."""
    tp = sizes.layout[-1]
    hidden = hidden_bytes(sizes.pieces, batch)
    logits = batch.num_tokens * len(sizes.pieces.output.weight) * torch.float32.itemsize
    # A sum is sent as two rings; of a process's logits, all but its own tokens' go to the others.
    layers = round(passes * 2 * sizes.num_layers * 2 * _ring(hidden, tp))
    return layers + 2 * _ring(hidden, tp) + exchanges * _ring(logits, tp)


def _ring(total: int, ranks: int) -> int:
    """Return the bytes that each of this many ranks receives of a total of which each has a shard."""
    return total * (ranks - 1) // ranks
