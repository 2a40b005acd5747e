"""No process of a launch outlives its launcher unseen, not even when that is killed with SIGKILL.

A launch is a chain: the launcher, the process that starts the ranks (`launch.cluster.agent`), the ranks. Each asks the
kernel for a signal for the moment when the one above it ends, however that ends. When the launcher is gone, the agent
is killed, since its own way to stop gives ranks seconds only. When the agent is gone, the ranks get SIGTERM, as from a
user: they save and end, and take the time they need. Before they have met they are killed: there is nothing to save,
and who waits for the others in torch's store hears no other signal.
"""

import ctypes
import os
import signal
import sys

AGENT_VARIABLE = "NANOTRON_RECIPES_AGENT"
"""Tells ranks the process that starts them: one that has lost it by the time that it asks has another parent."""
_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def signal_when_parent_ends(number: signal.Signals, parent: int) -> None:
    """Have `number` sent to this process when the process `parent`, which started it, ends.

    Linux only (prctl(2), PR_SET_PDEATHSIG); elsewhere nothing happens. The kernel watches the thread that started this
    process, which must therefore be one that lives as long as its process: the main thread. A parent that ended before
    the kernel could be asked is noticed too.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
