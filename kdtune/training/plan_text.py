"""A plan as lines to read: one column for each number of processes."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from kdtune.distributed import World, fake_world
from kdtune.training.hardware import DEFAULT_GPU, GPU, GPUS_PER_HOST, UTILIZATION, find_gpu, gpu_of
from kdtune.training.plan import Plan, check_trains, make_plan

_GIB = 2**30
# The driver, the collectives and what the allocator cannot use take the rest.
_USABLE = 0.9


def plan_text(plans: Sequence[Plan], gpu: GPU | None) -> str:
    """The plans of one config, which differ in their number of processes, side by side; times for a known card only."""
    rows = [*_memory_rows(plans, gpu), *_step_rows(plans, gpu), *_checkpoint_rows(plans)]
    width = max(len(label) for label, _ in rows)
    columns = [max(len(cells[index]) for _, cells in rows if cells) for index in range(len(plans))]
    lines = []
    for label, cells in rows:
        padded = "  ".join(cell.rjust(size) for cell, size in zip(cells, columns, strict=bool(cells)))
        lines.append(f"{label.ljust(width)}  {padded}".rstrip())
    return "\n".join([*lines, *_notes(plans, gpu)])


def plan_on_paper(
    cfg: Any, world_sizes: Sequence[int], *, gpu_name: str | None = None, seq_len: int | None = None
) -> str:
    """The plan of a config on so many processes, none of which exist; see `plan_text`.

    Args:
        cfg: of a recipe that trains.
        world_sizes: a column each.
        gpu_name: a name of `hardware.GPUS`; None: the default one, unless the config's device is the CPU.
        seq_len: as in `make_plan`.

    Raises:
        ConfigError: the recipe does not train, the card is not known, or the config does not fit a number of processes.
        CheckpointError: a model is described by its checkpoint alone, and that cannot be read.
    """
    check_trains(cfg)
    on_cpu = gpu_name is None and cfg.device == "cpu"
    gpu = None if on_cpu else find_gpu(gpu_name or DEFAULT_GPU)
    plans = []
    for size in world_sizes:
        with fake_world(size) if size > 1 else nullcontext(World(torch.device("cpu"))) as world:
            plans.append(make_plan(cfg, world, device_type="cpu" if on_cpu else "cuda", seq_len=seq_len))
    return plan_text(plans, gpu)


def print_plan(cfg: Any, world: World) -> None:
    """Prints, once, what a run that starts will take; all its processes call it."""
    try:
        gpu = None
        if world.device.type == "cuda":
            properties = torch.cuda.get_device_properties(world.device)
            gpu = gpu_of(properties.name, properties.total_memory / _GIB)
        text = plan_text([make_plan(cfg, world)], gpu)
    except Exception as error:
        # A plan is advice: a run may work whose parts, a user's own among them, cannot run on the meta device. What is wrong
        # with the config itself the run says in its own place.
        text = f"no plan: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    world.print(text)


def _row(label: str, plans: Sequence[Plan], value: Callable[[Plan], str]) -> tuple[str, list[str]]:
    return label, [value(plan) for plan in plans]


def _memory_rows(plans: Sequence[Plan], gpu: GPU | None) -> list[tuple[str, list[str]]]:
    unit, name = (_GIB, "GiB") if max(plan.peak.total for plan in plans) >= _GIB else (2**20, "MiB")

    def row(label: str, value: Callable[[Plan], int]) -> tuple[str, list[str]]:
        return _row(f"  {label}", plans, lambda plan: _digits(value(plan) / unit))

    rows = [
        _row("processes", plans, lambda plan: f"{plan.world_size:,}"),
        _row("replicas x shards x tp", plans, lambda plan: " x ".join(map(str, plan.layout))),
        (f"memory a process, {name}", []),
        row("student's weights" if plans[0].teacher else "weights", lambda plan: plan.held.stored),
    ]
    if plans[0].teacher:
        rows.append(row("teacher's weights", lambda plan: plan.teacher.sizes.total.stored if plan.teacher else 0))
    rows += [
        row("gradients", lambda plan: plan.held.gradients),
        row("optimizer state", lambda plan: plan.held.state),
        row("at the peak, activations", lambda plan: plan.peak.activations),
        row("... loss, or optimizer's step", lambda plan: plan.peak.loss),
        row("... weights made whole", lambda plan: plan.peak.gathered),
        row("... gradients summed so far", lambda plan: plan.peak.gradients),
        row("... gradients being summed", lambda plan: plan.peak.reduction),
        row("peak", lambda plan: plan.peak.total),
    ]
    if any(plan.host_bytes for plan in plans):
        rows.append(row("in the CPU's memory", lambda plan: plan.host_bytes))
    if gpu is not None:
        rows.append(_row(f"  fits into {gpu.name}", plans, lambda plan: _fits(plan.peak.total / _GIB, gpu.memory_gib)))
    return rows


def _step_rows(plans: Sequence[Plan], gpu: GPU | None) -> list[tuple[str, list[str]]]:
    rows = [
        ("a step", []),
        _row("  tokens, all processes", plans, lambda plan: f"{plan.tokens:,}"),
        _row("  teraFLOP a process", plans, lambda plan: _digits(plan.flops / 1e12)),
    ]
    if any(plan.world_size > 1 for plan in plans):
        rows += [
            _row("  all-gather, GB a process", plans, lambda plan: _digits(plan.volume.gather / 1e9)),
            _row("  reduce-scatter, GB", plans, lambda plan: _digits(plan.volume.reduce_scatter / 1e9)),
            _row("  all-reduce, GB", plans, lambda plan: _digits(plan.volume.all_reduce / 1e9)),
        ]
    if any(plan.volume.tensor_parallel for plan in plans):
        rows.append(_row("  tensor parallel, GB", plans, lambda plan: _digits(plan.volume.tensor_parallel / 1e9)))
    if gpu is not None:
        rows += [
            _row("  computing, s", plans, lambda plan: _digits(plan.computing(gpu))),
            _row("  communicating, s", plans, lambda plan: _digits(plan.communicating(gpu))),
            _row("  tokens a second, all processes", plans, lambda plan: _speed(plan, gpu)),
        ]
    return rows


def _checkpoint_rows(plans: Sequence[Plan]) -> list[tuple[str, list[str]]]:
    unit, name = (1e9, "GB") if max(plan.final_checkpoint for plan in plans) >= 1e9 else (1e6, "MB")
    return [
        (f"on disk, {name}", []),
        _row("  step_N", plans, lambda plan: _digits(plan.step_checkpoint / unit)),
        _row("  final", plans, lambda plan: _digits(plan.final_checkpoint / unit)),
    ]


def _notes(plans: Sequence[Plan], gpu: GPU | None) -> list[str]:
    first = plans[0]
    peaks: dict[str, list[str]] = {}
    for plan in plans:
        peaks.setdefault(plan.peak.name, []).append(f"{plan.world_size:,}")
    where = "; ".join(name + (f" ({', '.join(sizes)})" if len(plans) > 1 else "") for name, sizes in peaks.items())
    notes = [
        f"The peak is in {where}. Validation, samples and the driver are not in it.",
        f"Every example has {first.batch.seq_len:,} tokens ({first.seq_len_source}), all of which count: no step takes more.",
    ]
    if gpu is not None:
        notes += [
            f"Times are not measured: {gpu.name} at {UTILIZATION:.0%} of its stated {first.dtype} speed and links at theirs, in hosts of "
            f"{GPUS_PER_HOST}.",
            "The tokens a second lie between computing after communicating and both at once.",
            f"Source: {gpu.source}.",
        ]
    return notes


def _digits(value: float) -> str:
    """Three digits, or the whole number where that has more."""
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if value < 10 else 1}f}" if value >= 0.1 else f"{value:.2g}"


def _fits(needed_gib: float, memory_gib: float) -> str:
    share = needed_gib / memory_gib
    word = "yes" if share <= _USABLE else "barely" if share <= 1 else "no"
    return f"{word}, {share:.0%}"


def _speed(plan: Plan, gpu: GPU) -> str:
    computing, communicating = plan.computing(gpu), plan.communicating(gpu)
    slow, fast = (plan.tokens / seconds for seconds in (computing + communicating, max(computing, communicating)))
    return _digits(fast) if plan.world_size == 1 else f"{_rounded(slow):,} to {_rounded(fast):,}"


def _rounded(value: float) -> int:
    """The number with two digits that count."""
    return int(float(f"{value:.2g}"))
