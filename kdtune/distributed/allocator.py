"""Memory of a process that computes on a CPU: the C library keeps what is freed, for the next tensors."""

import ctypes
import os
import sys
from pathlib import Path

import torch

# <malloc.h>. The largest int: glibc takes the thresholds as ints.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST = 2**31 - 1
_MAPPED_FROM = 256 * 2**20
_MAPPED_FROM_OF_OLD = 32 * 2**20  # glibc before 2.35 refuses larger ones
_TOP_PAD = 256 * 2**20
# Of the resident set by gaps, before they are returned.
_GROWTH = 1.03


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory instead of returning it to the system; return whether it does.

    glibc returns every block from 32 MiB on when it is freed, and smaller ones at the end of the heap. The next tensor then
    touches fresh pages, which on a CPU costs about as much as computing on them. The process keeps its peak until it ends.
    Blocks from 256 MiB on, such as the gradient of a head of 128,256 ids, are returned as before: smaller ones would settle in the room
    of such a block, and the next step's would take another.

    Without effect under another C library, and where the user chose: a variable MALLOC_... (mallopt(3)) or GLIBC_TUNABLES is
    set.
    """
    if _is_chosen_by_user() or not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # The others without it would be worse than nothing: each of them ends glibc's own raising of this threshold.
    if not any(mallopt(_M_MMAP_THRESHOLD, size) for size in (_MAPPED_FROM, _MAPPED_FROM_OF_OLD)):
        return False
    return all([mallopt(_M_TRIM_THRESHOLD, _LARGEST), mallopt(_M_TOP_PAD, _TOP_PAD)])


def keep_few_kernels() -> None:
    """Make oneDNN keep the kernels of a few steps, unless the user chose; to be called before its first one.

    It compiles one for each shape, and the shapes of a step follow its number of tokens. Its default of 1,024 keeps those of many
    steps, some 30 MB each, which do not come again.
    """
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:  # the name of old
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


class Room:
    """Room for a step's tensors on a device: on a CPU, glibc keeps few gaps that no step can use.

    Tensors of a step larger than any before do not fit into the gaps among those of smaller ones, and take fresh pages beside them; those
    of smaller steps are cut out of them, and leave others. So free memory is returned to the system before such a step, and once the gaps
    have grown. The next step touches it again.
    """

    def __init__(self, device: torch.device) -> None:
        self._largest, self._bound, self._is_trimmed = 0, 0.0, False
        self._keeps_gaps = device.type == "cpu" and _is_glibc() and not _is_chosen_by_user()

    def make(self, size: int) -> None:
        """Make room for a step of a size, such as its number of tokens."""
        if not self._keeps_gaps:
            return
        resident = _resident_bytes()
        if self._is_trimmed:  # before the last step: this is what a step takes without old gaps
            self._bound = max(self._bound, _GROWTH * resident)
        self._is_trimmed = size > self._largest or resident > self._bound
        self._largest = max(self._largest, size)
        if self._is_trimmed:
            ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _is_chosen_by_user() -> bool:
    return any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)


def _is_glibc() -> bool:
    if sys.platform != "linux":
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):  # another C library
        return False
