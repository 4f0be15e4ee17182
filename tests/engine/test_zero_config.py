"""What a DeepSpeed file may say: repeat the recipe, say `auto`, or set what has an effect. All else is refused."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.utils.cpp_extension import _get_build_directory
from torch.utils.file_baton import FileBaton

from llavaforge.cli import main
from llavaforge.config.schema import shipped_deepspeed
from llavaforge.engine.cpu_adam import load_cpu_adam
from llavaforge.engine.memory import stage_of
from llavaforge.engine.zero import _with_buckets_that_fit
from llavaforge.engine.zero_config import build_settings, check_installed
from llavaforge.errors import UserError

KNOWN: dict[str, Any] = {
    "train_batch_size": 128,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "bf16.enabled": True,
    "bf16.check_grad_overflow": True,
    "fp16.enabled": False,
    "data_types.grad_accum_dtype": "fp32",
    "optimizer.type": "AdamW",
    "optimizer.params.lr": 2e-5,
    "optimizer.params.betas": [0.9, 0.999],
    "zero_allow_untested_optimizer": True,
}


def resolved(tmp_path: Path, content: Any, **known: Any) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return build_settings(str(path), KNOWN | known, hidden_size=2560)


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


@pytest.mark.parametrize("name", list(shipped_deepspeed()))
def test_what_is_shipped_is_complete_and_taken_by_deepspeed(name: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = build_settings(name, KNOWN, hidden_size=2560)
    assert stage_of(settings) == int(name[4])
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"} and settings["gradient_clipping"] == 1.0
    DeepSpeedZeroConfig(**settings["zero_optimization"])
    assert "auto" not in json.dumps(settings)


def test_without_a_name_it_is_zero_2() -> None:
    assert build_settings(None, KNOWN, 64) == build_settings("zero2", KNOWN, 64)


def test_auto_takes_the_recipes_values_and_what_follows_from_the_model(tmp_path: Path) -> None:
    content = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
        **zero(
            3, reduce_bucket_size="auto", stage3_prefetch_bucket_size="auto", stage3_param_persistence_threshold="auto"
        ),
    }
    settings = resolved(tmp_path, content)
    assert settings["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 2560**2,
        "stage3_prefetch_bucket_size": math.floor(0.9 * 2560**2),
        "stage3_param_persistence_threshold": 25_600,
    }
    assert "optimizer" not in settings and "train_batch_size" not in settings


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"train_batch_size": 64, **zero(2)}, "`train_batch_size` is 64 there and 128 in the recipe"),
        ({"gradient_clipping": 0.5, **zero(2)}, "`gradient_clipping` is 0.5 there and 1.0 in the recipe"),
        ({"bf16": {"enabled": False}, **zero(2)}, "`bf16.enabled` is False there and True in the recipe"),
        ({"fp16": {"enabled": True}, **zero(2)}, "`fp16.enabled` is True there"),
        ({"data_types": {"grad_accum_dtype": "bf16"}, **zero(2)}, "`data_types.grad_accum_dtype` is 'bf16' there"),
        ({"optimizer": {"type": "Lion"}, **zero(2)}, "`optimizer.type` is 'Lion' there and 'AdamW'"),
        ({"optimizer": {"params": {"lr": 1e-3}}, **zero(2)}, "`optimizer.params.lr` is 0.001 there and 2e-05"),
        ({"scheduler": {"type": "WarmupLR"}, **zero(2)}, "lr_scheduler_type, warmup_ratio and warmup_steps decide"),
        ({"fp16": {"loss_scale": 0}, **zero(2)}, "`fp16.loss_scale` would have no effect"),
        ({"gradient_cliping": 1.0, **zero(2)}, "Did you mean `gradient_clipping`?"),
        ({"steps_per_print": "auto", **zero(2)}, "`steps_per_print` cannot be \"auto\""),
        (zero(0), "`zero_optimization.stage` is 0: give 1, 2 or 3"),
        ({}, "`zero_optimization` is missing"),
        (zero(2, stage3_prefetch_bucket_size=1), "has no effect at stage 2 (it works at stage 3 only)"),
        (zero(3, allgather_bucket_size=1), "has no effect at stage 3 (it works at stages 1 and 2 only)"),
        (zero(1, overlap_comm=True), "has no effect at stage 1 in bfloat16"),
        (zero(3, stage3_gather_16bit_weights_on_model_save=True), "has no effect at stage 3"),
        (zero(2, offload_param={"device": "cpu"}), "offload_param` has no effect at stage 2"),
        (zero(2, offload_optimizer={"device": "nvme"}), "give {\"device\": \"cpu\"} or remove it"),
        (zero(2, offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload_optimizer.ratio` would have no effect"),
        (zero(2, reduce_bucket_size="5e8"), "reduce_bucket_size` is '5e8': give a whole number"),
        ([1], "a list instead of an object"),
    ],
)  # fmt: skip
def test_what_contradicts_or_would_be_ignored_is_refused(content: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        resolved(tmp_path, content)
    assert expected in str(refused.value) and str(tmp_path / "ds.json") in str(refused.value)


def test_sizes_may_be_written_as_the_manuals_do(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": true}}')
    zero_section = build_settings(str(path), KNOWN, 64)["zero_optimization"]
    assert zero_section == {"stage": 2, "reduce_bucket_size": 500_000_000, "overlap_comm": True}
    assert isinstance(zero_section["reduce_bucket_size"], int)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)gradient_clipping.*scheduler.*stage3_max_live_parameters"):
        resolved(
            tmp_path, {"gradient_clipping": 3, "scheduler": {"type": "x"}, **zero(2, stage3_max_live_parameters=1)}
        )


def test_offload_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"`c\+\+` \(a C\+\+ compiler\) is not there.*without offload_optimizer"):
        check_installed(build_settings("zero2-offload", KNOWN, 64))
    check_installed(build_settings("zero2", KNOWN, 64))


def test_deepspeed_that_is_not_installed(
    tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # what an import then finds: nothing
    flags = [f"--model_name_or_path={tiny_llava}", f"--data_path={shapes / 'train'}", f"--output_dir={tmp_path / 'r'}"]
    with pytest.raises(UserError, match="pip install 'llavaforge"):
        check_installed(build_settings("zero2", KNOWN, 64))
    assert main(["train", *flags, "--deepspeed=zero4"]) == 2
    assert "no such file: zero4 (or one of zero1, zero2-offload, zero2," in capsys.readouterr().err


def test_buckets_hold_no_more_than_what_learns() -> None:
    """DeepSpeed allocates two of them at once: 2 GB with the shipped files, for a projector of 9 million numbers."""
    file = {"stage": 2, "reduce_bucket_size": 500_000_000, "allgather_bucket_size": 500_000_000}
    assert _with_buckets_that_fit(file, 9_000_000) == file | {"reduce_bucket_size": 9_000_000}
    assert _with_buckets_that_fit(file, 4_000_000_000) == file
    assert _with_buckets_that_fit({"stage": 1}, 9_000_000) == {"stage": 1}


def test_a_build_that_was_killed_holds_up_no_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    built: list[str] = []

    def load(name: str, **_: object) -> str:
        folder = Path(_get_build_directory(name, verbose=False))
        assert FileBaton(str(folder / "lock")).try_acquire(), "torch would wait for ever"
        built.append(str(folder))
        return name  # without release, as a process that is killed

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    load_cpu_adam()
    OpBuilder._loaded_ops.clear()
    load_cpu_adam()
    assert len(built) == 2 and built[0] == built[1] and Path(built[0]).is_relative_to(tmp_path)
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)
