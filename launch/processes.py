"""How processes depend on each other: Linux's prctl(2), which Python does not offer."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of <sys/prctl.h>


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, of this process ID, ends; end now if it has ended already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Make processes whose parents have ended children of this one, if it is their ancestor."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
