"""The published recipe: CLIP-ViT-L/14-336 + Qwen1.5-4B-Chat, its tokenizer in full and its weights on `meta`."""

import json
import shutil
from pathlib import Path

import pytest
from bench.data.qwen import SPECIAL_TOKENS, qwen_tokenizer
from transformers import AutoProcessor, AutoTokenizer, CLIPVisionConfig, Qwen2Config

import tiny_parts
from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.join.embedding import num_embeddings
from llavaforge.join.parts import customize_model, join_configs
from llavaforge.join.tensors import part_parameters, stock_shapes
from llavaforge.join.tokenizer import prepare_tokenizer


@pytest.fixture(scope="module")
def qwen15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 with Qwen1.5's whole tokenizer, its files as the hub has them."""
    pytest.importorskip("dashscope", reason="the wheel that carries Qwen's vocabulary")
    folder = tiny_parts.save_language_model(
        tmp_path_factory.mktemp("qwen15"), vocab_size=151936, hidden_size=8, num_attention_heads=2,
        num_key_value_heads=2, num_hidden_layers=1,
    )  # fmt: skip
    for path in folder.glob("tokenizer*"):
        path.unlink()
    qwen_tokenizer().save_pretrained(folder)
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    fields = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(151643 + number): {"content": token, **entry} for number, token in enumerate(SPECIAL_TOKENS)
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": tiny_parts.CHATML,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def join(tiny_clip: Path, language_model: Path, output_dir: Path) -> dict:
    return customize_model(
        CustomizeModelConfig(vision_tower=str(tiny_clip), language_model=str(language_model), output_dir=output_dir)
    )


def test_qwen15_gives_image_the_id_151646_and_the_files_the_published_entries(qwen15: Path, tiny_clip, tmp_path: Path):
    result = join(tiny_clip, qwen15, tmp_path / "out")
    assert result["image_token_id"] == 151646
    fields = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert fields["added_tokens_decoder"]["151646"] == {
        "content": "<image>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    assert fields["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>", "<image>"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["image_token_index"] == 151646 and config["text_config"]["vocab_size"] == 151936
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert tokenizer("<image>").input_ids == [151646] and tokenizer.eos_token_id == 151645
    own = AutoTokenizer.from_pretrained(qwen15)
    text = "What is in 2024's picture?\n图片里有 <|im_start|>user"
    assert tokenizer(text).input_ids == own(text).input_ids and len(own) == 151646


def test_where_151646_is_taken_image_gets_the_next_id(qwen15: Path, tmp_path: Path):
    taken = Path(shutil.copytree(qwen15, tmp_path / "taken"))
    tokenizer = AutoTokenizer.from_pretrained(taken)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|object_ref_start|>"]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(taken)
    ready, image_token_id = prepare_tokenizer(taken, None)
    assert image_token_id == 151647
    assert ready("<|object_ref_start|><image>").input_ids == [151646, 151647]


def test_the_joined_model_has_its_parameters_at_full_size():
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=6912, num_hidden_layers=40, num_attention_heads=20,
        num_key_value_heads=20, tie_word_embeddings=False,
    )  # fmt: skip
    config = join_configs(vision, text, 151646)
    assert part_parameters(stock_shapes(config)) == {
        "vision_tower": 303_507_456,
        "projector": 9_180_160,
        "language_model": 3_950_369_280,
        "total": 4_263_056_896,
    }
    assert config.image_seq_length == 576 and config.vision_feature_select_strategy == "default"


@pytest.mark.parametrize(
    ("vocab_size", "image_token_id", "rows"),
    [(151936, 151646, 151936), (32000, 32000, 32064), (32064, 32011, 32064), (303, 303, 320), (304, 303, 304)],
)
def test_the_embedding_has_room_for_image_and_grows_to_a_multiple_of_64(vocab_size, image_token_id, rows):
    assert num_embeddings(vocab_size, image_token_id) == rows
