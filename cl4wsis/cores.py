"""How many threads are worth starting."""

import os


def usable_cores() -> int:
    """Return the number of cores this process may use, which in a container is less than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
