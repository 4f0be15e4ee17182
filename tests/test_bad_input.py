"""Bad input: exit code 2, a message with file, row and remedy, no traceback, and nothing lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llavaforge.cli import main

Spoil = Callable[[list[dict[str, Any]], Path], None]


@pytest.fixture
def data(shapes: Path, tmp_path: Path) -> Path:
    """A private copy of the training data."""
    return Path(shutil.copytree(shapes / "train", tmp_path / "data"))


def spoil(data: Path, change: Spoil) -> None:
    rows = json.loads((data / "chat.json").read_text())
    change(rows, data)
    (data / "chat.json").write_text(json.dumps(rows))


def set_turn(number: int, **values: str) -> Spoil:
    def change(rows: list[dict[str, Any]], _: Path) -> None:
        rows[3]["conversations"][number].update(values)

    return change


def remove_image(rows: list[dict[str, Any]], data: Path) -> None:
    (data / "images" / rows[3]["image"]).unlink()


def truncate_image(rows: list[dict[str, Any]], data: Path) -> None:
    image = data / "images" / rows[3]["image"]
    image.write_bytes(image.read_bytes()[:400])


FAULTS: dict[str, tuple[Spoil, list[str]]] = {
    "missing image": (remove_image, ["row 3", "shapes_train_000003.jpg", "Add the file or remove the row"]),
    "truncated image": (truncate_image, ["row 3", "shapes_train_000003.jpg", "Replace the file"]),
    "no placeholder": (set_turn(0, value="What?"), ["row 3", "exactly one `<image>`", "found 0"]),
    "two placeholders": (set_turn(0, value="<image><image>"), ["row 3", "exactly one `<image>`", "found 2"]),
    "unknown role": (set_turn(0, **{"from": "robot"}), ["row 3", "unknown role 'robot'", "Allowed: human"]),
    "empty answer": (set_turn(1, value=" "), ["row 3", "answer in turn 1 is empty", "remove the row"]),
}


def train_flags(model: Path, data: Path, output_dir: Path, *more: str) -> list[str]:
    flags = {"model_name_or_path": model, "data_path": data, "output_dir": output_dir, "max_steps": 12}
    fixed = ["--train_type=projector", "--per_device_train_batch_size=4", "--dataloader_num_workers=0", "--bf16=false"]
    return ["train", *(f"--{key}={value}" for key, value in flags.items()), *fixed, *more]


def assert_refused(capsys: pytest.CaptureFixture[str], code: int, *expected: str) -> None:
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err
    for text in expected:
        assert text in captured.err


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_data(
    fault: str, data: Path, tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = FAULTS[fault]
    spoil(data, change)
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    code = main(train_flags(tiny_llava, data, tmp_path / "run"))
    assert_refused(capsys, code, "chat.json", *expected)
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


def test_malformed_json(data: Path, tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "chat.json").write_text((data / "chat.json").read_text()[:-40])
    code = main(train_flags(tiny_llava, data, tmp_path / "run"))
    assert_refused(capsys, code, "chat.json:", "malformed JSON", "cut-off download")
    assert not (tmp_path / "run").exists()


def test_unknown_flag_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(
        capsys, main(["train", "--learning_rat", "1e-3"]), "`--learning_rat`", "Did you mean `--learning_rate`?"
    )
    assert_refused(capsys, main(["train", "--stages", "x"]), "`stages` is a list of mappings")
    assert_refused(capsys, main(["trane"]), "unknown verb `trane`", "Did you mean `train`?")
    assert_refused(capsys, main(["data", "make-shape"]), "Did you mean `data make-shapes`?")


def test_unknown_recipe_key_suggests_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: m\ndata_path: d\noutput_dir: o\nwarmup_ration: 0.1\n")
    assert_refused(
        capsys, main(["train", str(recipe)]), "recipe.yaml", "`warmup_ration`", "Did you mean `warmup_ratio`?"
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--learning_rate=fast"], "`learning_rate` = 'fast'"),
        (["--train_type=lora"], "'full', 'freeze_vision', 'use_lora' or 'projector'"),
        (["--global_batch_size=8", "--gradient_accumulation_steps=2"], "global_batch_size already fixes"),
        (["--warmup_ratio=0.1", "--warmup_steps=5"], "warmup_ratio or warmup_steps, not both"),
        (["--deepspeed=nowhere.json"], "deepspeed: no such file: nowhere.json"),
        (["--eval_steps=5"], "eval_steps needs held-out data"),
        (["--prompt_style=plain", "--system_prompt=x"], "system_prompt has no place"),
    ],
)
def test_values_that_make_no_sense(flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    required = ["--model_name_or_path=m", "--data_path=d", "--output_dir=o"]
    assert_refused(capsys, main(["train", *required, *flags]), expected)


def test_missing_required_field_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, main(["train", "--data_path=d", "--output_dir=o"]), "`model_name_or_path` is missing")


def test_model_folder_without_processor(
    tiny_llava: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_llava, tmp_path / "model"))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (model / name).unlink()
    code = main(train_flags(model, shapes / "train", tmp_path / "run"))
    assert_refused(capsys, code, str(model), "preprocessor_config.json")


def test_output_folder_of_another_run(
    tiny_llava: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_flags(tiny_llava, shapes / "train", tmp_path / "run")) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code = main(train_flags(tiny_llava, shapes / "train", tmp_path / "run", "--seed=7"))
    assert_refused(capsys, code, "belongs to another run", "seed: 42 there, 7 now", "another output_dir")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_two_processes_in_one_folder(
    tiny_llava: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".llavaforge.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = main(train_flags(tiny_llava, shapes / "train", tmp_path / "run"))
    assert_refused(capsys, code, "another process is training here")


def test_a_faulty_image_in_a_worker_is_told_without_its_traceback(
    data: Path, tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in (data / "images").iterdir():
        image.write_text("<html>404</html>")
    code = main(train_flags(tiny_llava, data, tmp_path / "run", "--dataloader_num_workers=1"))
    assert_refused(capsys, code, "chat.json row", "JPEG, PNG", "No step was done yet. Mend that and start again")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_images_that_went_after_the_index_was_made(
    data: Path, tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_flags(tiny_llava, data, tmp_path / "run", "--max_steps=1")) == 0
    capsys.readouterr()
    spoil(data, remove_image)
    code = main(train_flags(tiny_llava, data, tmp_path / "other"))
    assert_refused(capsys, code, "row 3", "Add the file or remove the row")
    assert not (tmp_path / "other").exists()


def test_data_without_any_image(
    data: Path, tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": "1", "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}]
    (data / "chat.json").write_text(json.dumps(rows))
    assert_refused(capsys, main(train_flags(tiny_llava, data, tmp_path / "run")), "no record has an image")


def test_a_start_that_failed_does_not_claim_the_folder(
    tiny_llava: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = train_flags(tiny_llava, shapes / "train", tmp_path / "run", "--train_type=use_lora", "--max_steps=1")
    assert_refused(capsys, main([*flags, "--lora_target_modules", "nonsense"]), "nonsense")
    assert main([*flags, "--lora_target_modules", "q_proj"]) == 0


def test_folders_that_are_something_else(
    tiny_llava: Path, tiny_clip: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "final").mkdir(parents=True)
    for model, expected in (
        (tmp_path / "run", "is a run's folder. Its finished model is"),
        (shapes, "holds no model"),
        (tiny_clip, "not a LLaVA. Join a vision tower"),
    ):
        assert_refused(capsys, main(train_flags(model, shapes / "train", tmp_path / "out")), str(model), expected)
    broken = Path(shutil.copytree(tiny_llava, tmp_path / "broken"))
    weights = next(broken.glob("model*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    code = main(train_flags(broken, shapes / "train", tmp_path / "out"))
    assert_refused(capsys, code, str(broken), "not a readable safetensors file")
    (tmp_path / "file").write_text("x")
    code = main(train_flags(tiny_llava, shapes / "train", tmp_path / "file"))
    assert_refused(capsys, code, "file: is a file. Give another output_dir")


def test_a_prompt_with_two_placeholders(tiny_llava: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = next((shapes / "train" / "images").iterdir())
    flags = [f"--model_name_or_path={tiny_llava}", f"--image={image}", "--prompt=<image> and <image>"]
    assert_refused(capsys, main(["chat", *flags]), "more than one `<image>`")


def test_dashes_and_underscores_are_the_same_and_flags_override_the_recipe(tmp_path: Path) -> None:
    from llavaforge.cli import parse

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: m\ndata_path: d\noutput_dir: o\nlearning_rate: 1e-3\ntrain_type: full\n")
    config = parse("train", [str(recipe), "--train-type", "projector", "--gradient-checkpointing"])
    assert (config.train_type, config.learning_rate, config.gradient_checkpointing) == ("projector", 1e-3, True)  # type: ignore[attr-defined]


def test_flags_override_every_stage_of_a_recipe(tmp_path: Path) -> None:
    from llavaforge.cli import parse
    from llavaforge.config.recipe import training_stages

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: m\ndata_path: d\noutput_dir: o\nstages:\n"
        "  - {name: one, train_type: projector, global_batch_size: 256}\n  - {name: two, global_batch_size: 128}\n"
    )
    plain = training_stages(parse("train", [str(recipe)]))  # type: ignore[arg-type]
    smaller = training_stages(parse("train", [str(recipe), "--global-batch-size", "4"]))  # type: ignore[arg-type]
    assert [stage.global_batch_size for stage in plain] == [256, 128]
    assert [(stage.train_type, stage.global_batch_size) for stage in smaller] == [("projector", 4), ("use_lora", 4)]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ("data: []", "`data` is an empty list: name a data set in it"),
        ("data: [{path: ''}]", "data, entry 1: `path` = '': is empty: name a file or folder"),
        ("{data_path: d, output_dir: ''}", "`output_dir` = '': is empty"),
        ("{data_path: d, gradient_checkpointing: often}", "`gradient_checkpointing` = 'often'"),
    ],
)
def test_empty_names_and_lists(values: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model_name_or_path": "m", "output_dir": "o", **yaml.safe_load(values)}))
    assert_refused(capsys, main(["train", str(recipe)]), told)
