"""Format a plan as text, one column per number of processes."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch

from kdtune.config import instantiate
from kdtune.distributed import World, fake_world, mesh_problems
from kdtune.errors import ConfigError
from kdtune.log import terminal_width, wrap
from kdtune.planner.advice import advice_text, changes_to_fit
from kdtune.planner.estimate import Estimate, check_trains, make_estimate
from kdtune.planner.hardware import DEFAULT_GPU, GPU, GPUS_PER_HOST, UTILIZATION, find_gpu, host_memory
from kdtune.planner.teacher import TeacherEstimate, make_teacher_estimate

T = TypeVar("T", Estimate, TeacherEstimate)
# A label and a cell for each plan; no cells: a heading.
Row = tuple[str, list[str]]
_GIB = 2**30
# The driver, the collectives and what the allocator cannot use take the rest.
_USABLE = 0.9


def table_text(plans: Sequence[Estimate], gpu: GPU | None) -> str:
    """Format plans of one config for several numbers of processes side by side; times only for a known card."""
    teachers = [plan.teacher_estimate for plan in plans if plan.teacher_estimate]
    rows = [
        *_memory_rows(plans, gpu),
        *(_teacher_rows(teachers, gpu) if teachers else []),
        *_step_rows(plans, gpu),
        *_checkpoint_rows(plans),
    ]
    return "\n".join([*_lines(rows), *(wrap(note, terminal_width()) for note in _notes(plans, gpu))])


def _lines(rows: Sequence[Row]) -> list[str]:
    width = max(len(label) for label, _ in rows)
    columns = [max(map(len, cells)) for cells in zip(*(cells for _, cells in rows if cells), strict=True)]
    lines = []
    for label, cells in rows:
        padded = "  ".join(cell.rjust(size) for cell, size in zip(cells, columns, strict=bool(cells)))
        lines.append(f"{label.ljust(width)}  {padded}".rstrip())
    return lines


def estimate_text(
    cfg: Any, world_sizes: Sequence[int], *, gpu_name: str | None = None, seq_len: int | None = None
) -> str:
    """Estimate a config for numbers of processes that need not exist; see `table_text`.

    Args:
        cfg: config of a recipe that trains.
        world_sizes: numbers of processes, one column each.
        gpu_name: a name of `hardware.GPUS`; None: the default one, unless the config's device is the CPU.
        seq_len: as in `make_estimate`.

    Raises:
        ConfigError: the recipe does not train, the card is not known, or the config does not fit a number of processes.
        CheckpointError: only the checkpoint describes a model, and it cannot be read.
    """
    check_trains(cfg)
    on_cpu = gpu_name is None and cfg.device == "cpu"
    gpu = None if on_cpu else find_gpu(gpu_name or DEFAULT_GPU)
    options = {"device_type": "cpu" if on_cpu else "cuda", "seq_len": seq_len}
    plans = [_plan(cfg, size, **options) for size in world_sizes]
    text = table_text(plans, gpu)
    if gpu is None and world_sizes[-1] > 1:  # on how many machines is not known
        return text
    room = _USABLE * (host_memory() if gpu is None else gpu.memory_gib * _GIB)
    if plans[-1].peak.total <= room:
        return text
    changes = list(changes_to_fit(cfg, room, lambda changed: _plan(changed, world_sizes[-1], **options).peak.total))
    where = f"{_USABLE:.0%} of {gpu.name if gpu else 'the memory of this machine'}"
    where += f" on {world_sizes[-1]:,} processes" if world_sizes[-1] > 1 else ""
    return f"{text}\n{advice_text(changes, room, where)}"


def _plan(cfg: Any, size: int, **options: Any) -> Estimate:
    """Estimate a config for a number of processes that need not exist; `options` of `make_estimate`."""
    parallelism, teacher = instantiate(cfg.parallelism), instantiate(getattr(cfg, "teacher_parallelism", None))
    num_teachers = getattr(cfg, "teacher_processes", 0)
    students = size - num_teachers
    if students < 1:
        raise ConfigError(
            f"teacher_processes={num_teachers}: --world-size {size} leaves none for the student; give more"
        )
    if problems := mesh_problems(
        parallelism, teacher, size, teacher_processes=num_teachers, advice="give another --world-size"
    ):
        raise ConfigError("; ".join(problems))
    # One process without torchrun has no process group, and FSDP nothing to do.
    with fake_world(students) if size > 1 else nullcontext(World(torch.device("cpu"))) as world:
        plan = make_estimate(cfg, world, **options)
    if num_teachers:
        with fake_world(num_teachers) as world:
            plan = replace(plan, teacher_estimate=make_teacher_estimate(cfg, world, students, **options))
    elif plan.teacher and plan.teacher.is_elsewhere:
        own = options | {"device_type": torch.device(cfg.teacher_device).type}
        plan = replace(plan, teacher_estimate=make_teacher_estimate(cfg, World(torch.device("cpu")), 1, **own))
    return plan


def _row(label: str, plans: Sequence[T], value: Callable[[T], str]) -> Row:
    return label, [value(plan) for plan in plans]


def _bytes_row(label: str, plans: Sequence[T], unit: int, value: Callable[[T], int]) -> Row:
    return _row(f"  {label}", plans, lambda plan: _digits(value(plan) / unit))


def _unit(plans: Sequence[Estimate] | Sequence[TeacherEstimate]) -> tuple[int, str]:
    return (_GIB, "GiB") if max(plan.peak.total for plan in plans) >= _GIB else (2**20, "MiB")


def _fits_row(plans: Sequence[T], gpu: GPU) -> Row:
    return _row(f"  fits into {gpu.name}", plans, lambda plan: _fits(plan.peak.total / _GIB, gpu.memory_gib))


def _memory_rows(plans: Sequence[Estimate], gpu: GPU | None) -> list[Row]:
    unit, name = _unit(plans)
    teacher = plans[0].teacher

    def row(label: str, value: Callable[[Estimate], int]) -> Row:
        return _bytes_row(label, plans, unit, value)

    rows = [_row("processes", plans, lambda plan: f"{plan.world_size:,}")]
    if teacher and teacher.num_ranks:
        rows.append(_row("of these, with the teacher alone", plans, lambda _: f"{teacher.num_ranks:,}"))
    rows += [
        _row("replicas x shards x tp", plans, lambda plan: " x ".join(map(str, plan.layout))),
        (f"memory a process, {name}", []),
        row("student's weights" if teacher or plans[0].stored_head else "weights", lambda plan: plan.held.stored),
    ]
    if teacher:
        label = "teacher's head" if teacher.is_elsewhere else "teacher's weights"
        rows.append(row(label, lambda plan: plan.teacher.stored if plan.teacher else 0))
    elif plans[0].stored_head:
        rows.append(row("teacher's head", lambda plan: plan.stored_head))
    rows += [
        row("gradients", lambda plan: plan.held.gradients),
        row("optimizer state", lambda plan: plan.held.state),
        row("at the peak, activations", lambda plan: plan.peak.activations),
        *([row("... keys and values", lambda plan: plan.peak.cache)] if any(plan.peak.cache for plan in plans) else []),
        row("... loss, or optimizer's step", lambda plan: plan.peak.loss),
        row("... all-gathered weights", lambda plan: plan.peak.gathered),
        row("... reduced gradients", lambda plan: plan.peak.gradients),
        row("... reduce-scatter buffers", lambda plan: plan.peak.reduction),
        row("peak", lambda plan: plan.peak.total),
    ]
    if any(plan.host_bytes for plan in plans):
        rows.append(row("in the CPU's memory", lambda plan: plan.host_bytes))
    return [*rows, _fits_row(plans, gpu)] if gpu is not None else rows


def _teacher_rows(plans: Sequence[TeacherEstimate], gpu: GPU | None) -> list[Row]:
    """Return the table rows of ranks that hold only the teacher, or of `teacher_device`."""
    (unit, name), device = _unit(plans), plans[0].device
    rows = [
        (f"memory of {device}, for the teacher, {name}" if device else f"memory a process of the teacher, {name}", []),
        _bytes_row("weights", plans, unit, lambda plan: plan.teacher.on_device),
        _bytes_row("at the peak, activations", plans, unit, lambda plan: plan.peak.activations),
        _bytes_row("... all-gathered weights", plans, unit, lambda plan: plan.peak.gathered),
        *(
            [_bytes_row("... keys and values", plans, unit, lambda plan: plan.peak.cache)]
            if any(plan.peak.cache for plan in plans)
            else []
        ),
        _bytes_row("peak", plans, unit, lambda plan: plan.peak.total),
    ]
    if any(plan.teacher.on_host for plan in plans):
        rows.append(_bytes_row("in the CPU's memory", plans, unit, lambda plan: plan.teacher.on_host))
    if gpu is not None and (device is None or device.startswith("cuda")):
        rows.append(_fits_row(plans, gpu))
    rows += [
        ("a step of the teacher", []),
        _row("  teraFLOP a process", plans, lambda plan: _digits(plan.flops / 1e12)),
    ]
    if any(plan.gather for plan in plans):
        rows.append(_row("  all-gather, GB a process", plans, lambda plan: _digits(plan.gather / 1e9)))
    return rows


def _step_rows(plans: Sequence[Estimate], gpu: GPU | None) -> list[Row]:
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
    if any(plan.volume.answers for plan in plans):
        rows.append(_row("  from the teacher, GB", plans, lambda plan: _digits(plan.volume.answers / 1e9)))
    if gpu is not None:
        rows += [
            _row("  computing, s", plans, lambda plan: _digits(plan.computing(gpu))),
            _row("  communicating, s", plans, lambda plan: _digits(plan.communicating(gpu))),
            _row("  tokens a second, all processes", plans, lambda plan: _speed(plan, gpu)),
        ]
    return rows


def _checkpoint_rows(plans: Sequence[Estimate]) -> list[Row]:
    unit, name = (1e9, "GB") if max(plan.final_checkpoint for plan in plans) >= 1e9 else (1e6, "MB")
    return [
        (f"on disk, {name}", []),
        _row("  step_N", plans, lambda plan: _digits(plan.step_checkpoint / unit)),
        _row("  final", plans, lambda plan: _digits(plan.final_checkpoint / unit)),
    ]


def _notes(plans: Sequence[Estimate], gpu: GPU | None) -> list[str]:
    first = plans[0]
    peaks: dict[str, list[str]] = {}
    for plan in plans:
        peaks.setdefault(plan.peak.name, []).append(f"{plan.world_size:,}")
    where = "; ".join(name + (f" ({', '.join(sizes)})" if len(plans) > 1 else "") for name, sizes in peaks.items())
    notes = [
        f"The peak is in {where}. Validation, samples and the driver are not in it.",
        f"Every example has {first.batch.seq_len:,} tokens ({first.seq_len_source}), all of which count: no micro-batch takes more.",
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
    """Format with three digits, or as an integer if that has more."""
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if value < 10 else 1}f}" if value >= 0.1 else f"{value:.2g}"


def _fits(needed_gib: float, memory_gib: float) -> str:
    share = needed_gib / memory_gib
    word = "yes" if share <= _USABLE else "tight" if share <= 1 else "no"
    return f"{word}, {share:.0%}"


def _speed(plan: Estimate, gpu: GPU) -> str:
    computing, communicating = plan.computing(gpu), plan.communicating(gpu)
    slow, fast = (plan.tokens / seconds for seconds in (computing + communicating, max(computing, communicating)))
    return _digits(fast) if plan.world_size == 1 else f"{_rounded(slow):,} to {_rounded(fast):,}"


def _rounded(value: float) -> int:
    """Round to two significant digits."""
    return int(float(f"{value:.2g}"))
