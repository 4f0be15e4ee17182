"""Real photographs at CLIP-L's geometry: 336 pixels, patch 14, 576 tokens, on narrow random parts."""

import os
from pathlib import Path

import pytest

import tiny_parts
from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.join.parts import customize_model
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from train_tools import TRAIN_TYPES, train_config

# 258 photographs in the layout of LLaVA-CC3M-Pretrain-595K; they stand beside the checkout where they are at hand.
PHOTOS = Path(os.environ.get("LLAVAFORGE_PHOTOS", Path(__file__).parents[2] / "shared" / "data" / "photos"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip-l")
    tower = tiny_parts.save_clip(folder / "tower", image_size=336, patch_size=14)
    language_model = tiny_parts.save_language_model(folder / "lm", "qwen2", max_position_embeddings=1024)
    customize_model(
        CustomizeModelConfig(vision_tower=str(tower), language_model=str(language_model), output_dir=folder / "model")
    )
    return folder / "model"


@pytest.mark.slow
@pytest.mark.skipif(not (PHOTOS / "chat.json").is_file(), reason="the photographs are not at hand")
@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_twenty_steps_on_photographs_lower_the_loss(train_type: str, model: Path, tmp_path: Path) -> None:
    result = train(
        train_config(
            model, PHOTOS, tmp_path / "run", train_type=train_type, max_steps=20, global_batch_size=8,
            per_device_train_batch_size=8, learning_rate=5e-3, projector_learning_rate=5e-3,
        )
    )  # fmt: skip
    assert result["global_step"] == 20
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    tokens = [line["num_tokens"] for line in read_metrics(tmp_path / "run")]
    assert all(number > 8 * 576 for number in tokens)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
