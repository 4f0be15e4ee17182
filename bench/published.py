"""The table of docs/scaling.md that compares `estimate` with published training times; `python -m bench.published`.

Times: haotian-liu/LLaVA, README (LLaVA-1.5 on eight A100), and the model card of alpharomercoma/vqwen3-4b (one H200).
Sizes: the config.json of the models named. Not published, so assumed: samples of 600 tokens in stage 1 and of 825 in
stage 2, of which half of the text is supervised; all of LLaVA's scripts recompute every layer.
"""

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavaforge.config.schema import EstimateConfig
from llavaforge.forecast.estimate import estimate
from llavaforge.results import EstimateResult

_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
VICUNA_7B = {"model_type": "llama", "vocab_size": 32_064}
VICUNA_13B = {
    **VICUNA_7B, "hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 40,
}  # fmt: skip
QWEN3_4B = {
    "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": True,
}  # fmt: skip
STAGE_1: dict[str, Any] = {
    "train_type": "projector", "num_samples": 558_128, "text_tokens": 24, "global_batch_size": 256,
    "per_device_train_batch_size": 32,
}  # fmt: skip
STAGE_2: dict[str, Any] = {  # 40,688 of the 665,298 samples have no image
    "train_type": "freeze_vision", "num_samples": 665_298, "text_tokens": 284, "images_per_sample": 0.939,
    "global_batch_size": 128, "per_device_train_batch_size": 16, "deepspeed": "zero3",
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A training whose time was published."""

    name: str
    hours: float
    text_config: dict[str, Any]
    options: dict[str, Any]

    def estimated(self, **options: Any) -> EstimateResult:
        """Return the estimate of it, which prints nothing."""
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            content = {"model_type": "llava", "vision_config": _CLIP, "text_config": self.text_config}
            (Path(folder) / "config.json").write_text(json.dumps(content))
            values = {"model_name_or_path": folder, **self.options, **options}
            return estimate(EstimateConfig.model_validate(values))


_EIGHT = {"gpu": "a100-80gb", "num_gpus": 8}
RUNS = (
    Published("LLaVA-1.5-7B, stage 1, 8 x A100-80GB", 3.5, VICUNA_7B, {**STAGE_1, **_EIGHT}),
    Published("LLaVA-1.5-13B, stage 1, 8 x A100-80GB", 5.5, VICUNA_13B, {**STAGE_1, **_EIGHT}),
    Published("LLaVA-1.5-7B, stage 2, 8 x A100-40GB", 10, VICUNA_7B, {**STAGE_2, **_EIGHT, "gpu": "a100-40gb"}),
    Published("LLaVA-1.5-13B, stage 2, 8 x A100-80GB", 20, VICUNA_13B, {**STAGE_2, **_EIGHT}),
    Published("CLIP-L + Qwen3-4B, stage 1, one H200", 6.1, QWEN3_4B, {**STAGE_1, "gpu": "h200"}),
)


def rows() -> Iterator[str]:
    """Yield the rows of the table."""
    yield "| run | published | MFU that this implies | `estimate`, all layers recomputed | as `estimate` would run it |"
    yield "|---|--:|--:|--:|--:|"
    for run in RUNS:
        at_peak = run.estimated(mfu=1.0, gradient_checkpointing=False)["hours_per_epoch"]
        recomputed, own = run.estimated(gradient_checkpointing=True)["hours_per_epoch"], run.estimated()
        layers = {0: "no layer", 1: "all layers"}.get(own["recompute_every"], f"1 in {own['recompute_every']}")
        yield (
            f"| {run.name} | {run.hours} h | {at_peak / run.hours:.0%} | {recomputed:.1f} h "
            f"({recomputed / run.hours - 1:+.0%}) | {own['hours_per_epoch']:.1f} h ({layers}) |"
        )


if __name__ == "__main__":
    sys.stdout.write("\n".join(rows()) + "\n")
