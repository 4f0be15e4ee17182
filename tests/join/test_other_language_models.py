"""Any language model of transformers is joined so that it trains, or refused in a sentence that names it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.errors import UserError
from llavaforge.join.parts import customize_model
from tiny_parts import _SIZES, save_tokenizer

# Other libraries' names of the same sizes.
SIZES: dict[str, Any] = {
    **_SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "word_embed_proj_dim": 32, "ffn_dim": 48,
    "state_size": 8, "d_model": 32, "n_layers": 2, "n_heads": 4,
}  # fmt: skip
REFUSED = (
    "StableLm",
    "Nemotron",
    "OPT",
    "GPT2",
    "GPTNeoX",
    "Falcon",
    "Bloom",
    "Mamba",
    "Bart",
    "Bert",
    "XGLM",
    "Mpt",
    "GptOss",
)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_trained_is_not_joined(family: str, tiny_clip: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    save_tokenizer(tmp_path / "lm")
    options = CustomizeModelConfig(
        vision_tower=str(tiny_clip), language_model=str(tmp_path / "lm"), output_dir=tmp_path / "model"
    )
    with pytest.raises(UserError, match=str(tmp_path / "lm")):
        customize_model(options)
    assert not (tmp_path / "model").exists()


def test_llava_in_its_authors_own_layout_is_refused_with_the_way(tiny_clip: Path, tiny_lm: Any, tmp_path: Path) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(tiny_lm("llama"), tmp_path / "llava-v1.5-7b"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": "mlp2x_gelu"}
    (folder / "config.json").write_text(json.dumps(config))
    for tower, language_model in ((tiny_clip, folder), (folder, tiny_lm("llama"))):
        options = CustomizeModelConfig(
            vision_tower=str(tower), language_model=str(language_model), output_dir=tmp_path / "model"
        )
        with pytest.raises(UserError, match=r"authors' own layout \(LlavaLlamaForCausalLM\).*llava-hf/llava-1.5-7b-hf"):
            customize_model(options)
