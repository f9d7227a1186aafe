"""The memory of this process, as the system counts it."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """The process's peak resident memory so far.

    On Linux from /proc: what `getrusage` gives includes the parent's memory at the time of the fork.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """What the process holds now: interpreter, torch, and the headers.

    What was freed goes back to the system before: else it depends on chance how much of it is still held.
    """
    import torch

    torch.get_num_threads()  # brings in what torch loads late
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc has no such thing
        ctypes.CDLL(None).malloc_trim(0)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except OSError:
        return peak_resident_bytes()
