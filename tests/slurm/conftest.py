"""The cluster of the `slurm` tests: one per session, gone when it ends."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cluster as slurm
import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurm.Cluster]:
    """Two nodes; what is set here is what a user's shell would hold at `sbatch`."""
    reason = slurm.why_not()
    if reason:
        pytest.skip(reason)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    # The names n1 and n2 mean nothing to a resolver.
    environment |= {"VENV": sys.prefix, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:  # sockets want short paths
        started = slurm.Cluster(Path(folder), environment)
        try:
            Path(folder).chmod(0o755)
            started.start()
            yield started
        finally:
            started.stop()
