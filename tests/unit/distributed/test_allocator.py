"""Freed memory stays with the process, unless the user chose otherwise."""

import os
import subprocess
import sys

import pytest

from kdtune.distributed import allocator

_FRESH_PAGES = """
import resource
from kdtune.distributed import start_world
import torch
with start_world(torch.device("cpu")):
    for _ in range(3):
        block = bytearray(2**26)
        del block
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.empty(2**24).fill_(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not allocator._is_glibc(), reason="another C library")
def test_a_run_on_a_cpu_touches_no_fresh_pages() -> None:
    """As the system counts them, for a tensor of 64 MiB after blocks of that size were freed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", _FRESH_PAGES], env=clean, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**26 // os.sysconf("SC_PAGE_SIZE") / 10


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_users_choice_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert not allocator.keep_freed_memory()


@pytest.mark.parametrize(("accepted", "kept"), [(2**31 - 1, True), (32 * 2**20, True), (0, False)])
def test_an_old_glibc_takes_a_smaller_threshold_or_nothing(
    accepted: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other two settings without the threshold would be worse than none."""
    calls: dict[int, int] = {}

    class Library:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            if option == allocator._M_MMAP_THRESHOLD and value > accepted:
                return 0
            calls[option] = value
            return 1

    for name in [*os.environ]:
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES":
            monkeypatch.delenv(name)
    monkeypatch.setattr(allocator, "_is_glibc", lambda: True)
    monkeypatch.setattr("ctypes.CDLL", lambda _: Library)
    assert allocator.keep_freed_memory() == kept
    assert calls.get(allocator._M_MMAP_THRESHOLD) == (accepted if kept else None) and len(calls) == (3 if kept else 0)
