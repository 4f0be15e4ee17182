"""The memory that may still be taken is the least of what the host and each control group have left."""

from pathlib import Path

import pytest

from llavaforge.processes.host_memory import free_host_memory

GB = 1000**3


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("version", [1, 2])
def test_a_job_has_what_its_groups_leave_it(version: int, tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable: 64000000 kB\n"})
    assert free_host_memory(tmp_path) == 64_000_000 * 1024  # and no groups at all
    line, mount, most, taken, total = (
        ("4:memory:", "memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        if version == 1
        else ("0::", "", "memory.max", "memory.current", "")
    )
    write(tmp_path, {"proc/self/cgroup": f"8:pids:/job\n{line}/slurm/job_7/step_0\n"})
    assert free_host_memory(tmp_path) == 64_000_000 * 1024  # a container, which sees no groups above its own
    for group, limit in (("step_0", "max" if version == 2 else "9223372036854771712"), ("", str(32 * GB))):
        folder = f"sys/fs/cgroup/{mount}slurm/job_7/{group}"
        files = {most: limit, taken: str(12 * GB), "memory.stat": f"anon 1\n{total}inactive_file {2 * GB}"}
        write(tmp_path, {f"{folder}/{name}": f"{text}\n" for name, text in files.items()})
    assert free_host_memory(tmp_path) == 22 * GB


def test_where_the_system_does_not_tell_there_is_enough(tmp_path: Path) -> None:
    assert free_host_memory(tmp_path) > 10**6 * GB
    assert free_host_memory() > 0
