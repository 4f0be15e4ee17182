"""The verb: quick, without torch; what it says follows from its options; bad input is refused with what to do."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llavaforge.cli import main
from llavaforge.data.index.open import open_index
from llavaforge.engine.memory import engine_memory
from llavaforge.forecast.estimate import estimate
from llavaforge.machine.random_model import PUBLISHED, REPLICA, llava_config, train_options
from llavaforge.model.flops import FlopCounter
from llavaforge.model.load import LoadedModel
from llavaforge.model.trainable import set_trainable
from llavaforge.training.cards import CARDS, known_card

_LONGEST_S = 10.0  # alone: 0.6 s of processor time; other tests run beside it


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    llava_config(PUBLISHED).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replica")
    llava_config(REPLICA).save_pretrained(folder)
    return folder


def told(folder: Path, **options: Any) -> Any:
    return estimate(cases.estimate_config(model_name_or_path=str(folder), **options))


def test_a_process_takes_no_torch_and_little_time(published: Path) -> None:
    code = (
        "import sys; from llavaforge.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'pyarrow')))"
    )
    begin = time.perf_counter()
    command = [sys.executable, "-c", code, "estimate", "--model_name_or_path", str(published), "--gpu", "h200"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - begin < _LONGEST_S
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["parameters"]["total"] == 4_263_056_896
    assert "4,263,056,896" in done.stdout and "mfu_is assumed" in done.stdout


def test_every_train_type_and_engine_has_a_row(replica: Path) -> None:
    result = told(replica, num_gpus=4, train_type="full", deepspeed="zero3")
    engines = {"zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"}
    rows = {(row["train_type"], row["engine"]): row for row in result["rows"]}
    assert rows.keys() == {(kind, engine) for kind in cases.KINDS for engine in engines}
    chosen = rows["full", "zero3"]
    assert {name: result[name] for name in chosen} == chosen
    assert {row["engine"] for row in told(replica)["rows"]} == {"plain", *engines}
    assert (told(replica)["engine"], told(replica, num_gpus=2)["engine"]) == ("plain", "zero2")


@pytest.mark.parametrize("kind", cases.KINDS)
def test_memory_is_the_engines_own_figures(kind: str, published: Path) -> None:
    sizes = cases.reckoned(llava_config(PUBLISHED))
    result = told(published, num_gpus=8, train_type=kind, lora_r=6)
    for row in (row for row in result["rows"] if row["train_type"] == kind):
        held = engine_memory(row["engine"], sizes.counts(cases.learning(kind)), 8)
        parts = row["memory_per_gpu"]
        assert [parts[name] for name in ("weights", "gradients", "optimizer", "buffers")] == [
            round(value) for value in (held.weights, held.gradients, held.optimizer, held.buffers)
        ]
        assert parts["total"] == pytest.approx(sum(parts.values()) - parts["total"], abs=10)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_hours_are_flops_over_the_rate(kind: str, replica: Path) -> None:
    options = dict(mfu=0.25, peak_tflops=100, gpu_memory_gb=80, num_gpus=4, num_samples=7200, price_per_gpu_hour=2.5)
    options |= dict(train_type=kind, text_tokens=50, supervised_tokens=20)
    result = told(replica, gradient_checkpointing=False, **options)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_config(REPLICA))
    set_trainable(model, train_options(kind))
    of_sample = FlopCounter.of(model, 576).step([626], 1, 20)
    assert result["hours_per_epoch"] == pytest.approx(7200 * of_sample / (4 * 0.25 * 100e12) / 3600, rel=1e-9)
    assert result["cost_per_epoch"] == pytest.approx(2.5 * 4 * result["hours_per_epoch"])
    again = told(replica, gradient_checkpointing=True, **options)
    more = FlopCounter.of(model, 576).recomputed([626], 1) / of_sample
    assert again["hours_per_epoch"] == pytest.approx(result["hours_per_epoch"] * (1 + more))


def test_the_largest_micro_batch_fits_and_one_more_does_not(published: Path) -> None:
    for row in told(published, gpu="a100-80gb", gradient_checkpointing=True)["rows"]:
        options = dict(gpu="a100-80gb", gradient_checkpointing=True, train_type=row["train_type"])
        options |= {"deepspeed": None if row["engine"] == "plain" else row["engine"]}
        assert row["fits"] == (row["largest_micro_batch"] >= row["micro_batch"])
        for number in (row["largest_micro_batch"], row["largest_micro_batch"] + 1):
            if number and row["train_type"] in ("projector", "freeze_vision"):
                one = told(published, per_device_train_batch_size=number, **options)
                assert one["fits"] == (number == row["largest_micro_batch"])


def test_less_memory_means_more_recomputation_and_hours(published: Path) -> None:
    results = [told(published, train_type="projector", gpu_memory_gb=size) for size in (80, 24, 14)]
    every = [result["recompute_every"] for result in results]
    assert every[0] == 0 and every[1] in (4, 2) and every[2] == 1
    hours = [result["hours_per_epoch"] for result in results]
    assert hours == sorted(hours) and hours[0] < hours[-1]
    assert not told(published, train_type="full", gpu_memory_gb=24)["fits"]


def test_moments_in_8_bits(published: Path) -> None:
    whole, quarter = (told(published, train_type="full", optim=optim) for optim in ("adamw", "adamw_8bit"))
    saved = whole["memory_per_gpu"]["optimizer"] - quarter["memory_per_gpu"]["optimizer"]
    assert saved == 6 * whole["learning"]
    assert {row["engine"] for row in quarter["rows"]} == {"plain"}


def test_a_recipe_and_flags_that_override_it(replica: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {replica}\noutput_dir: o\ndata_path: d\nlearning_rate: 1e-3\nglobal_batch_size: 64\n"
        "stages:\n- {name: first, train_type: projector}\n- {name: second, train_type: full, deepspeed: zero3}\n"
    )
    found = {}
    for stage in ("first", "second"):
        arguments = [str(recipe), "--stage", stage, "--gpu", "h200", "--num-gpus", "2", "--global_batch_size", "32"]
        assert main(["estimate", *arguments]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["assumptions"]["global_batch_size"] == 32
        found[stage] = (result["train_type"], result["engine"])
    assert found == {"first": ("projector", "zero2"), "second": ("full", "zero3")}


def test_samples_are_read_from_a_prepared_index(
    tiny_llava: Path, loaded_llava: LoadedModel, shapes: Path, tmp_path: Path
) -> None:
    options = train_options("full", cache_dir=tmp_path)
    index = open_index(shapes / "train", loaded_llava.processor, loaded_llava.num_image_tokens, options)
    result = told(tiny_llava, data_index=index.data_sets[0].path, mfu=0.5, peak_tflops=1, train_type="full")
    assumed = result["assumptions"]
    assert assumed["num_samples"] == len(index)
    assert assumed["tokens_per_sample"] == round(float(index.lengths.mean()), 1)
    model = LlavaForConditionalGeneration(loaded_llava.model.config)
    set_trainable(model, options)
    flops = FlopCounter.of(model, loaded_llava.num_image_tokens).of_index(index).sum()
    assert result["hours_per_epoch"] == pytest.approx(flops / 0.5e12 / 3600)


def test_what_a_machine_measured_counts(published: Path, tmp_path: Path) -> None:
    """Of `env --check`: its card, its memory, its MFU by train type; compiled layers gain what they gained there."""
    device = {"name": "NVIDIA H200", "memory_gib": 139.8}
    speeds = {"projector at real size": 0.3, "projector at real size, compiled": 0.45, "full at real size": 0.2,
              "projector at real size, all layers recomputed": 0.1}  # fmt: skip
    checks = [{"name": name, "ok": True, "figures": {"mfu": mfu}} for name, mfu in speeds.items()]
    content = {"devices": [device], "memory_gib": 99, "compute_dtype": "bfloat16", "checks": checks}
    path = tmp_path / "env.json"
    path.write_text(json.dumps(content))
    result = told(published, gpu=None, env=path)
    mfu = {(row["train_type"], row["engine"]): row["mfu"] for row in result["rows"]}
    assert mfu["projector", "plain"] == pytest.approx(0.45) and mfu["full", "plain"] == pytest.approx(0.3)
    assert mfu["full", "zero3"] == 0.2 and mfu["use_lora", "plain"] == 0.4  # not compiled; not measured
    assert result["gpu"] == "NVIDIA H200" and result["assumptions"]["gpu_memory_bytes"] == round(139.8 * 2**30)
    assert told(published, gpu=None, env=path, mfu=0.33)["mfu"] == 0.33
    assert told(published, env=path)["assumptions"]["peak_tflops"] == 989.4
    # A CPU has no data sheet: its best matrix product is the peak.
    product = {"name": "matrix product, float32", "ok": True, "figures": {"tflops": 0.2}}
    small = {"name": "projector at a 120th of the size", "ok": True, "figures": {"mfu": 0.6}}
    content |= {"devices": [], "cpu": "a CPU", "compute_dtype": "float32", "checks": [product, small]}
    path.write_text(json.dumps(content))
    result = told(published, gpu=None, env=path, bf16=False, train_type="projector")
    assert (result["gpu"], result["mfu"], result["assumptions"]["peak_tflops"]) == ("a CPU", 0.6, 0.2)
    assert result["assumptions"]["gpu_memory_bytes"] == (99 * 2**30)


@pytest.mark.parametrize(
    ("name", "memory_gb"),
    [("a100-40gb", 40), ("A100", 80), ("NVIDIA A100-SXM4-80GB", 80), ("rtx 4090", 24), ("NVIDIA GH200 480GB", 96),
     ("NVIDIA H100 80GB HBM3", 80), ("h100 nvl", 94)],
)  # fmt: skip
def test_cards_are_known_by_name(name: str, memory_gb: float) -> None:
    card = known_card(name)
    assert card is not None and card.memory_gb == memory_gb
    assert card.bf16_tflops == next(row.bf16_tflops for words, row in CARDS.items() if words.lower() in name.lower())


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "no model: give model_name_or_path, or vision_tower and language_model"),
    ({"vision_tower": "MODEL"}, "no model"),
    ({"model_name_or_path": "MODEL", "vision_tower": "MODEL"}, "vision_tower and language_model belong together"),
    ({"model_name_or_path": "/nowhere"}, "no such folder"),
    ({"model_name_or_path": "EMPTY"}, "config.json: missing"),
    ({"model_name_or_path": "MODEL", "gpu": None}, "no machine: give --gpu NAME .such as a100-80gb."),
    ({"model_name_or_path": "MODEL", "gpu": "h2000"}, "Did you mean `H200`.*--peak_tflops and --gpu_memory_gb"),
    ({"model_name_or_path": "MODEL", "bf16": "false"}, "rate in float32 is not known. Give --peak_tflops"),
    ({"model_name_or_path": "MODEL", "mfu": "1.4"}, "`mfu` = '1.4'"),
    ({"model_name_or_path": "MODEL", "env": "MODEL/config.json"}, "not a file that `llavaforge env --check"),
    ({"model_name_or_path": "MODEL", "data_index": "MODEL/config.json"}, "Give an `index/.*arrow` of the cache"),
    ({"model_name_or_path": "MODEL", "deepspeed": "MODEL/config.json"}, "no `zero_optimization.stage`"),
    ({"model_name_or_path": "MODEL", "deepspeed": "zero4"}, "no such file: zero4"),
    ({"model_name_or_path": "MODEL", "optim": "adamw_8bit", "num_gpus": "2"}, "single process without DeepSpeed"),
    ({"model_name_or_path": "MODEL", "max_tokens_per_batch": "4096"}, "give global_batch_size too"),
    ({"model_name_or_path": "MODEL", "supervised_tokens": "99"}, "at most text_tokens, 64"),
    ({"model_name_or_path": "MODEL", "lora_target_modules": "nothing"}, "match nothing in the language model"),
    ({"vision_tower": "MODEL", "language_model": "PHI"}, "is a `phi`. `estimate` knows the layers of qwen2"),
    ({"vision_tower": "PHI", "language_model": "MODEL"}, "A vision tower is one of"),
    ({"model_name_or_path": "PHI"}, "is a `phi`, not a LLaVA"),
    ({"model_name_or_path": "BROKEN"}, "`text_config` is 'llama', a mapping was expected"),
    ({"model_name_or_path": "ODD"}, "`hidden_size` is 'wide', a positive number was expected"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input_says_what_to_do(
    options: dict[str, Any], message: str, replica: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": "wide"}}
    broken = {"model_type": "llava", "text_config": "llama"}
    for name, content in (("phi", {"model_type": "phi"}), ("odd", odd), ("broken", broken)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    (tmp_path / "empty").mkdir()
    places = {"MODEL": replica, "PHI": tmp_path / "phi", "ODD": tmp_path / "odd", "EMPTY": tmp_path / "empty"}
    places["BROKEN"] = tmp_path / "broken"
    words = ["estimate"]
    for name, value in {"gpu": "h200", **options}.items():
        for short, place in places.items():
            value = value and re.sub(rf"\b{short}\b", str(place), value)
        words += [] if value is None else [f"--{name}", value]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
