"""What each step of a training job costs, written by the job itself: the same measurement in every tool.

A line of JSON per step: wall clock, processor seconds and peak resident set of this process, and processor seconds of
all processes, so that a step during which others were busy can be left out.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class StepLog:
    """Append a line per step; a `metric_logger` of kdtune (log) and of torchtune (log_dict)."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115  open as long as the job

    def log(self, values: Mapping[str, Any], step: int, *rest: Any) -> None:
        """Record a step; torchtune's call with a name and one value is left out, as are validations."""
        if not rest and isinstance(values, Mapping) and "loss" in values:
            numbers = {name: float(value) for name, value in values.items()}
            self._file.write(json.dumps({"step": step, **numbers, **cost()}) + "\n")
            self._file.flush()

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        """Record a step."""
        self.log(payload, step)

    def log_config(self, config: Any) -> None:
        """Do nothing: the job's settings are known."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cost() -> dict[str, float]:
    """Return seconds on the clock, processor seconds of this process and of all, and this process's peak memory in GiB."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "clock": time.perf_counter(),
        "processor": usage.ru_utime + usage.ru_stime,
        "everybody": 0.0,
        "peak_gib": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30,
    }
    stat = Path("/proc/stat")
    if stat.exists():
        ticks = [
            int(number) for number in stat.read_text().splitlines()[0].split()[1:9]
        ]  # idle is the 4th, waiting the 5th
        found["everybody"] = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return found
