"""How much memory the processes of a run may still take on this host.

Comes in: what Linux tells in /proc and /sys. Goes out: bytes.
"""

import sys
from pathlib import Path

# Version 2 of control groups, and version 1 (cgroups(7)): where they are mounted, and their files of what may be taken,
# what is taken, and what of that is a cache of files, which the system gives back. A group counts its children's.
_GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": (
        "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}  # fmt: skip


def free_host_memory(root: Path = Path("/")) -> int:
    """Return the bytes that may still be taken: of the host's memory, and of what a container or SLURM's job may take.

    Args:
        root: of the file system.

    Returns:
        A number above all memories where the system does not tell.
    """
    free = [sys.maxsize]
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:  # not Linux
        return min(free)
    for _, kind, path in groups:
        if kind in _GROUPS:
            mount, limit, used, caches = _GROUPS[kind]
            inside = Path(path.lstrip("/"))
            free += [_free(root / mount / group, limit, used, caches) for group in (inside, *inside.parents)]
    return min(free)


def _free(group: Path, limit: str, used: str, caches: tuple[str, ...]) -> int:
    try:
        most, taken = ((group / name).read_text().strip() for name in (limit, used))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # the root has no limit; a container sees its own groups only
        return sys.maxsize
    return sys.maxsize if most == "max" else int(most) - int(taken) + sum(int(counts.get(name, 0)) for name in caches)
