"""Freed memory stays with the process, unless the user chose otherwise."""

import os
import subprocess
import sys

import pytest
import torch

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


@pytest.mark.parametrize(("accepted", "kept"), [(2**28, True), (32 * 2**20, True), (0, False)])
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


def test_room_is_made_before_steps_that_are_larger_than_all_before_and_once_gaps_have_grown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trimmed: list[int] = []

    class Library:
        @staticmethod
        def malloc_trim(pad: int) -> int:
            trimmed.append(pad)
            return 1

    monkeypatch.setattr(allocator, "_is_glibc", lambda: True)
    monkeypatch.setattr("ctypes.CDLL", lambda _: Library)
    resident = iter([100, 200, 202, 300, 210, 211, 260, 261, 400, 405])
    monkeypatch.setattr(allocator, "_resident_bytes", lambda: next(resident))
    room, counts = allocator.Room(torch.device("cpu")), []
    # A first step, smaller ones without gaps and with some, one that is larger, and memory that is in use from then on.
    for size in (3, 2, 3, 3, 2, 2, 5, 5, 4, 4):
        room.make(size)
        counts.append(len(trimmed))
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    allocator.Room(torch.device("cuda")).make(9)
    assert len(trimmed) == 4


_GAPS = """
import torch
from kdtune.distributed.allocator import Room, _resident_bytes, keep_freed_memory
assert keep_freed_memory()
room = Room(torch.device("cpu"))
room.make(1)
room.make(1)  # a step lies between them
before, kept, held = _resident_bytes(), [], []
for _ in range(100):
    kept.append(torch.ones(2**20))
    held.append(torch.ones(2**14))  # what outlives a step lies between what it frees
del kept
gaps = _resident_bytes() - before
room.make(1)
print(gaps >> 20, _resident_bytes() - before >> 20)
"""


@pytest.mark.skipif(not allocator._is_glibc(), reason="another C library")
def test_gaps_are_returned_to_the_system() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", _GAPS], env=clean, capture_output=True, text=True, check=True)
    gaps, left = map(int, done.stdout.split())
    assert gaps > 380 and left < 40
