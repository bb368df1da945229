"""Steps of a real model on real processes, and what they hold: the witnesses of the plan."""

import gc
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from kdtune import data, distributed, losses, parallel, runs, teachers, training
from kdtune.config import factory, instantiate
from kdtune.distributed import to_local
from kdtune.losses.products import Buffers
from kdtune.models import dtype_from_name
from kdtune.models.nf4 import is_nf4, nf4_parts
from kdtune.planner.estimate import make_estimate
from kdtune.planner.teacher import make_teacher_estimate


def live_storages() -> dict[int, tuple[StorageWeakRef, int]]:
    """All storages that Python can reach, with their bytes. Tensors of other kinds, such as DTensor or NF4, are made of plain ones.

    While the weak references are held, no other storage has the same key.
    """
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter) and not one.is_meta]
    storages = [one.untyped_storage() for one in tensors]
    return {one._cdata: (StorageWeakRef(one), one.nbytes()) for one in storages}


def live_bytes(others: Mapping[int, object]) -> int:
    """Bytes of all storages but those that were there before."""
    return sum(size for key, (_, size) in live_storages().items() if key not in others)


def peak_growth(profile: torch.profiler.profile) -> int:
    """The most bytes that the CPU's allocator had given out at once, more than at the start."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def run_steps(cfg: Any, folder: Path) -> None:
    """Two steps on this process of several; what it held goes to a JSON file."""
    with distributed.start_world(torch.device("cpu"), teacher_processes=cfg.teacher_processes) as world:
        found = answers(cfg, world) if world.is_teacher else steps(cfg, world)
        (folder / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


def steps(cfg: Any, world: distributed.World) -> dict[str, Any]:
    """Two steps as the recipe makes them: what this rank held, and what a plan that it makes itself says, in bytes."""
    parallelism, dtype = instantiate(cfg.parallelism), dtype_from_name(cfg.dtype)
    Buffers._spare.clear()  # of an earlier run in this process
    others = live_storages()

    plan = make_estimate(cfg, world)
    teacher = teachers.build_teacher(cfg, world)
    student = parallel.build_model(
        factory(cfg.model), None, dtype=dtype, world=world, parallelism=parallelism, adapter=factory(cfg.adapter),
        activation_checkpointing=cfg.checkpointed,
    )  # fmt: skip
    optimizer, _ = training.build_optimizer(cfg, student, 10)
    kd_loss = losses.KDLoss(kd_ratio=cfg.kd_ratio, chunk_size=cfg.loss_chunk_size)
    shape = (cfg.batch_size, cfg.tokenizer["max_seq_len"])
    held = plan.held
    sizes: dict[str, Any] = {"planned": [held.stored, held.gradients, held.state, plan.peak.total]}
    sizes["weights"] = _bytes(student.parameters())

    def micro_batch() -> None:
        tokens = torch.randint(64, shape)
        batch = data.Batch.from_labels(tokens, tokens.clone())
        signal = teacher(batch)
        hidden = student(batch.tokens, return_hidden=True)
        loss, _ = kd_loss(hidden, student.output, signal, batch.labels)
        (loss / tokens.numel()).backward()

    def step() -> None:
        for _ in range(cfg.gradient_accumulation_steps):
            micro_batch()
        sizes["gradients"] = _bytes(p.grad for p in student.parameters() if p.grad is not None)
        training.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    sizes["state"] = _bytes(
        value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)
    )
    before = live_bytes(others)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    sizes |= {"before": before, "peak": before + peak_growth(profile)}
    return sizes


def answers(cfg: Any, world: distributed.World) -> dict[str, int]:
    """What a process of a teacher apart holds while the student's make their steps, and what a plan says of it, in bytes."""
    others, plan = live_storages(), make_teacher_estimate(cfg, world, world.channel.num_students)
    model = teachers.build_teacher_model(cfg, world)
    weights, before = _bytes(model.parameters()), live_bytes(others)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        teachers.serve(lambda: model, world, runs.InterruptFlag())
    return {"weights": weights, "peak": before + peak_growth(profile), "planned": plan.peak.total}


def _bytes(tensors: Any) -> int:
    return sum(part.nbytes for tensor in tensors for part in _parts(to_local(tensor)))


def _parts(tensor: Tensor) -> Iterable[Tensor]:
    if is_nf4(tensor):
        return nf4_parts(tensor).values()
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    return [getattr(tensor, name) for name in names] or [tensor]
