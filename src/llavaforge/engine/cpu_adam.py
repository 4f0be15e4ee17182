"""DeepSpeed's AdamW for the CPU: compiled once per machine, loaded once per process.

torch guards the folder that it compiles in by a file which only a process that ends well removes: after a kill, all
later starts wait for ever (pytorch issue 189245, mended after torch 2.13). So llavaforge compiles in a folder of its
own, under a lock that ends with its process; a lock of torch's that is found there meanwhile belongs to nobody.
"""

import os
from pathlib import Path

import torch
from filelock import FileLock, Timeout

_TIMEOUT_S = 1800  # a compilation takes two minutes, on a busy machine ten


def load_cpu_adam() -> None:
    """Compile it where that is still to do; DeepSpeed finds it loaded afterwards.

    Raises:
        TimeoutError: another process has compiled for half an hour.
        Exception: whatever the compiler says.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder

    folder = _folder()
    lock = folder / "llavaforge.lock"
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    try:
        with FileLock(lock, timeout=_TIMEOUT_S):
            (folder / CPUAdamBuilder.NAME / "lock").unlink(missing_ok=True)
            CPUAdamBuilder().load(verbose=False)
    except Timeout:
        raise TimeoutError(f"another process holds {lock} for {_TIMEOUT_S / 60:.0f} minutes") from None
    finally:
        if before is None:
            del os.environ["TORCH_EXTENSIONS_DIR"]
        else:
            os.environ["TORCH_EXTENSIONS_DIR"] = before


def _folder() -> Path:
    """Return where these versions compile: below the folder of torch's extensions, in one that is ours alone."""
    import deepspeed
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root) / f"llavaforge-torch-{torch.__version__}-deepspeed-{deepspeed.__version__}"
