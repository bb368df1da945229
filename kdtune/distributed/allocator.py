"""Memory of a process that computes on a CPU: the C library keeps what is freed, for the next tensors."""

import ctypes
import os
import sys

# <malloc.h>. The largest int: glibc takes the thresholds as ints.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST = 2**31 - 1
_LARGEST_OF_OLD = 32 * 2**20  # glibc before 2.35 refuses larger ones
_TOP_PAD = 256 * 2**20


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory instead of returning it to the system; return whether it does.

    glibc returns every block from 32 MiB on when it is freed, and smaller ones at the end of the heap. The next tensor then
    touches fresh pages, which on a CPU costs about as much as computing on them. The process keeps its peak until it ends.
    Blocks from 2 GiB on, such as large weights, are returned as before.

    Without effect under another C library, and where the user chose: a variable MALLOC_... (mallopt(3)) or GLIBC_TUNABLES is
    set.
    """
    is_chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if is_chosen or not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # The others without it would be worse than nothing: each of them ends glibc's own raising of this threshold.
    if not any(mallopt(_M_MMAP_THRESHOLD, size) for size in (_LARGEST, _LARGEST_OF_OLD)):
        return False
    return all([mallopt(_M_TRIM_THRESHOLD, _LARGEST), mallopt(_M_TOP_PAD, _TOP_PAD)])


def _is_glibc() -> bool:
    if sys.platform != "linux":
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):  # another C library
        return False
