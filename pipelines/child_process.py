"""How a process that draws ends: with its parent, or with an exit code that tells the parent why. No torch."""

import ctypes
import signal
import sys

DEVICE_LOST = 70  # EX_SOFTWARE of sysexits.h: only a new process can use the device again
LOAD_FAILED = 78  # EX_CONFIG of sysexits.h: a new process would fail, too
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent dies, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
