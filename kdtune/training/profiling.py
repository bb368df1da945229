"""torch's profiler as a config node: `profiler: {_component_: kdtune.training.Profiler}`; null profiles nothing."""

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from kdtune.errors import ConfigError
from kdtune.paths import user_path


class Profiler:
    """Profile some steps; each cycle writes a Chrome trace and a table of the most expensive operators.

    Use it as a context and call `step()` after every optimizer step. The argument names are torchtune's.

    Args:
        output_dir: the run's folder; `profile/trace_step_N.json` (for chrome://tracing or Perfetto) and
            `profile/operators_step_N.txt` go into it.
        wait_steps: steps not profiled at the start of a cycle.
        warmup_steps: steps profiled and discarded, because the first are not typical.
        active_steps: steps recorded.
        num_cycles: number of cycles; 0: until the end.
        profile_memory: record allocations.
        with_stack: record Python stacks (slow).
        record_shapes: record the operators' input shapes.
        with_flops: estimate floating-point operations.
    """

    def __init__(
        self,
        output_dir: str | Path,
        wait_steps: int = 1,
        warmup_steps: int = 2,
        active_steps: int = 2,
        num_cycles: int = 1,
        profile_memory: bool = False,
        with_stack: bool = False,
        record_shapes: bool = True,
        with_flops: bool = False,
    ) -> None:
        if active_steps < 1 or min(wait_steps, warmup_steps, num_cycles) < 0:
            raise ConfigError(
                f"profiler: wait_steps={wait_steps}, warmup_steps={warmup_steps}, active_steps={active_steps}, "
                f"num_cycles={num_cycles}; active_steps must be 1 or more and the others 0 or more"
            )
        self._output_dir = user_path(output_dir) / "profile"
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=wait_steps, warmup=warmup_steps, active=active_steps, repeat=num_cycles),
            on_trace_ready=self._write,
            profile_memory=profile_memory,
            with_stack=with_stack,
            record_shapes=record_shapes,
            with_flops=with_flops,
        )

    def _write(self, finished: Any) -> None:
        self._output_dir.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self._output_dir / f"trace_step_{finished.step_num}.json"))
        sort_by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=sort_by, row_limit=40)
        (self._output_dir / f"operators_step_{finished.step_num}.txt").write_text(table, encoding="utf-8")

    def __enter__(self) -> "Profiler":
        self._profile.__enter__()
        return self

    def step(self) -> None:
        """Report that an optimizer step is done."""
        self._profile.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, traceback)
