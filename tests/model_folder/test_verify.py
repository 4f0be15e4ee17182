import json
import shutil
from pathlib import Path

import pytest
import torch

from llavaforge.errors import UserError
from llavaforge.model_folder.tensors import open_tensors, write_shards
from llavaforge.model_folder.verify import compare_logits, load_verified


@pytest.fixture
def copy(tiny_llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llava, tmp_path / "copy"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors; None takes one away."""
    tensors = {**dict(open_tensors(folder)), **changes}
    write_shards(folder, "model", [(name, tensor) for name, tensor in tensors.items() if tensor is not None])


def test_a_sound_folder_loads_in_the_type_asked_for(tiny_llava: Path):
    assert load_verified(tiny_llava).dtype == torch.float32
    assert load_verified(tiny_llava, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json"])
def test_a_folder_without_processor_is_refused_with_the_remedy(copy: Path, name: str):
    (copy / name).unlink()
    if name.startswith("pre"):
        (copy / "processor_config.json").unlink()
    with pytest.raises(UserError, match=r"has no processor.*customize-model"):
        load_verified(copy)


def test_a_missing_an_unknown_and_a_misshapen_tensor_are_named(copy: Path):
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    whole = open_tensors(copy)[name].clone()
    rewrite(copy, **{name: None})
    with pytest.raises(UserError, match=r"missing keys: .*layers.0.mlp.up_proj.weight"):
        load_verified(copy)
    rewrite(copy, **{name: whole, "language_model.model.extra": torch.zeros(2)})
    with pytest.raises(UserError, match=r"unexpected keys: .*extra"):
        load_verified(copy)
    rewrite(copy, **{name: whole[:-1], "language_model.model.extra": None})
    with pytest.raises(UserError, match=r"mismatched keys: .*layers.0.mlp.up_proj.weight"):
        load_verified(copy)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"image_token_index": 5}, r"`<image>` is \[303\] to the tokenizer and 5 to config"),
        ("processor_config.json", {"num_additional_image_tokens": 0}, "writes 3 `<image>` tokens .* yields 4"),
        ("processor_config.json", {"patch_size": 7}, "writes 16 `<image>` tokens .* yields 4"),
        ("processor_config.json", {"vision_feature_select_strategy": "full"}, "select_strategy is 'full'"),
        ("preprocessor_config.json", {"crop_size": {"height": 42, "width": 42}}, "does not take the processor's"),
        ("config.json", {"auto_map": {"AutoModel": "x.Y"}}, "asks for code of its own"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "asks for code of its own"),
        ("config.json", {"model_type": "qwen2"}, "is a `qwen2`, not a LLaVA"),
    ],
)  # fmt: skip
def test_files_that_contradict_each_other_are_refused(copy: Path, file: str, changes: dict, message: str):
    edit(copy / file, **changes)
    with pytest.raises(UserError, match=message):
        load_verified(copy)


def test_an_image_token_beyond_the_embedding_is_refused(copy: Path):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["vocab_size"] = 300
    (copy / "config.json").write_text(json.dumps(config))
    files = open_tensors(copy)
    cut = {name: files[name][:300].clone() for name in files if files.shape(name)[:1] == (384,)}
    rewrite(copy, **cut)
    with pytest.raises(UserError, match="has id 303, but the embedding has only 300 rows"):
        load_verified(copy)


def test_logits_that_differ_or_are_no_numbers_are_refused():
    logits = torch.zeros(1, 2, 3)
    assert compare_logits(logits, torch.zeros(1, 2, 5), atol=0.0, what="x") == 0.0
    assert compare_logits(logits, logits + 0.5, atol=0.5, what="x") == 0.5
    with pytest.raises(UserError, match=r"x: logits differ by 0.5 \(at most 0.4"):
        compare_logits(logits, logits + 0.5, atol=0.4, what="x")
    with pytest.raises(UserError, match="logits differ by nan"):
        compare_logits(logits, logits * float("nan"), atol=1.0, what="x")
