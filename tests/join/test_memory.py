import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, Qwen2Config

import tiny_parts
from llavaforge.join.parts import join_configs
from llavaforge.join.tensors import stock_shapes
from llavaforge.model_folder.tensors import write_shards

MEASURE = """
import json, re, sys
import psutil
import transformers
from transformers import AutoModelForCausalLM, AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration
from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.join.parts import customize_model
import torch
torch.set_num_threads(1)
tower, small, language_model, output_dir, dtype = sys.argv[1:]
def join(language_model, output_dir):
    customize_model(CustomizeModelConfig(
        vision_tower=tower, language_model=language_model, output_dir=output_dir, torch_dtype=dtype))
# The libraries' own pages come at their first use (of bfloat16's matrix products alone 30 MB): they are no model's.
join(small, output_dir + "-small")
baseline = psutil.Process().memory_info().rss
join(language_model, output_dir)
# Not getrusage: its maximum is inherited from the process that started this one.
status = open("/proc/self/status").read()
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
print(json.dumps(peak - baseline))
"""
SIZES = dict(
    vocab_size=49152, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
    num_key_value_heads=12, tie_word_embeddings=False,
)  # fmt: skip


def save_big_language_model(folder: Path, dtype: torch.dtype) -> Path:
    """Save a language model of 160 M parameters without drawing each one."""
    tiny_parts.save_language_model(folder, vocab_size=384)
    config = Qwen2Config(**SIZES, dtype=dtype)
    (folder / "model.safetensors").unlink()
    config.save_pretrained(folder)
    vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    shapes = stock_shapes(join_configs(vision, config, 303))
    noise = (0.02 * torch.randn(SIZES["vocab_size"] * SIZES["hidden_size"])).to(dtype)
    text = {name: shape for name, shape in shapes.items() if name.startswith(("model.language_model.", "lm_head."))}
    tensors = (
        (name.replace("model.language_model.", "model."), noise[: shape.numel()].view(shape).clone())
        for name, shape in text.items()
    )
    write_shards(folder, "model", tensors)
    return folder


@pytest.mark.parametrize(("stored", "asked"), [(torch.bfloat16, "auto"), (torch.float32, "bfloat16")])
def test_peak_memory_stays_within_1_2_of_the_result_s_size(stored, asked, tiny_clip: Path, tmp_path: Path):
    small = tiny_parts.save_language_model(tmp_path / "small", dtype=stored)
    source = save_big_language_model(tmp_path / "lm", stored)
    command = [sys.executable, "-c", MEASURE, str(tiny_clip), str(small), str(source), str(tmp_path / "out"), asked]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    peak = json.loads(run.stdout.splitlines()[-1])
    assert size > 300e6
    assert peak <= 1.2 * size, f"{peak / size:.2f} times the result's size"
