"""The Python functions are the verbs: same options, same defaults, typed, written out, and light to import."""

import inspect
import os
import pydoc
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
from tools import write_api

import llavaforge
from llavaforge.cli import VERBS
from llavaforge.config import schema

SRC = Path(llavaforge.__file__).parent.parent
USING = Path(__file__).parent.parent / "docs" / "using.md"
FUNCTIONS: dict[str, Callable[..., Any]] = {verb: getattr(llavaforge, write_api.name_of(verb)) for verb in VERBS}


def test_the_file_is_what_the_schema_gives() -> None:
    assert write_api.API.read_text() == write_api.generate(), "run `python -m tools.write_api`"


def test_every_verb_has_a_public_function() -> None:
    names = {function.__name__ for function in FUNCTIONS.values()}
    assert names == {
        "quickstart", "customize_model", "check", "preview", "make_shapes",
        "train", "compare", "evaluate", "chat", "demo", "export", "env", "estimate", "slurm",
    }  # fmt: skip
    assert names <= set(llavaforge.__all__)
    modules = {path.stem for path in (SRC / "llavaforge").iterdir()}
    assert not names & modules, "importing such a module would put it in the function's place"


@pytest.mark.parametrize("verb", VERBS)
def test_signatures_have_the_options_and_defaults_of_the_schema(verb: str) -> None:
    parameters = inspect.signature(FUNCTIONS[verb]).parameters
    fields = getattr(schema, VERBS[verb].schema).model_fields
    assert parameters.keys() == fields.keys()
    for name, parameter in parameters.items():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert (parameter.default is inspect.Parameter.empty) == fields[name].is_required(), name
        if not fields[name].is_required():
            default = fields[name].get_default()
            assert parameter.default == (
                tuple(default) if isinstance(default, list) else str(default) if isinstance(default, Path) else default
            )


def test_types_are_what_a_caller_may_give() -> None:
    found = get_type_hints(llavaforge.train)
    expected = {
        "model_name_or_path": str | Path,
        "output_dir": str | Path,
        "data_path": str | Path | None,
        "system_prompt": str | None,
        "data": Sequence[Mapping[str, Any]],
        "stages": Sequence[Mapping[str, Any]],
        "lora_target_modules": Sequence[str],
        "train_type": Literal["full", "freeze_vision", "use_lora", "projector"],
        "num_train_epochs": float,
        "warmup_steps": int | None,
        "gradient_checkpointing": bool | int | Literal["auto"],
        "bf16": bool | Literal["auto"],
        "resume_from_checkpoint": Literal["auto"] | str | Path,
        "return": llavaforge.TrainResult,
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("verb", VERBS)
def test_results_are_those_of_the_verbs(verb: str) -> None:
    module, function = VERBS[verb].function.split(":")
    does = getattr(import_module(f"llavaforge.{module}"), function)
    assert get_type_hints(FUNCTIONS[verb])["return"] == get_type_hints(does)["return"]


def test_no_option_named_in_the_generator_is_gone() -> None:
    assert {name for f in FUNCTIONS.values() for name in inspect.signature(f).parameters} >= write_api.NAMES_OR_FOLDERS
    assert {function.__name__ for function in FUNCTIONS.values()} >= write_api.FURTHER_RAISES.keys()


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_option(verb: str) -> None:
    text = " ".join(pydoc.plaintext.document(FUNCTIONS[verb]).split())
    for name, info in getattr(schema, VERBS[verb].schema).model_fields.items():
        assert " ".join(f"{name}: {info.description}".split()) in text
    assert "Raises: UserError:" in text


def test_help_of_train_shows_types_defaults_and_result() -> None:
    text = pydoc.plaintext.document(llavaforge.train)
    assert "warmup_ratio: float = 0.03" in text
    assert "`num_bad_samples`" in text


def test_importing_is_light() -> None:
    code = "import sys, llavaforge; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True).stdout.split()
    assert "llavaforge" in loaded
    assert not {"torch", "transformers", "pydantic", "pyarrow", "numpy", "yaml", "rich", "argparse"} & set(loaded)


def test_a_wrong_keyword_is_pythons_own_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="num_sample"):
        llavaforge.make_shapes(output_dir=tmp_path, num_sample=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="output_dir"):
        llavaforge.make_shapes()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"seed": "many"}, "seed"),
        ({"lora_dropout": 2}, "lora_dropout"),
        ({"train_type": "everything"}, "train_type"),
        ({"lora_target_modules": "q_proj"}, "lora_target_modules"),
        ({"data_path": None, "data": [{"path": Path("a"), "wieght": 1}]}, "weight"),
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, "warmup_ratio"),
    ],
)
def test_a_bad_value_is_a_user_error_that_names_the_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(llavaforge.UserError, match=f"train: .*{field}"):
        llavaforge.train(**{"model_name_or_path": "model", "output_dir": "out", "data_path": "data"} | options)


def test_only_what_differs_from_the_default_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[schema.TrainConfig] = []
    monkeypatch.setattr("llavaforge.training.run.train", configs.append)
    llavaforge.train(
        model_name_or_path=Path("model"),
        output_dir="out",
        data=({"path": Path("a"), "repeat": 2}, {"path": "b"}),
        warmup_steps=3,
        warmup_ratio=0.03,
        resume_from_checkpoint="auto",
        num_train_epochs=1.0,
    )
    (config,) = configs
    assert config.model_fields_set == {
        "model_name_or_path",
        "output_dir",
        "data",
        "warmup_steps",
    }
    assert config == schema.TrainConfig(
        model_name_or_path="model",
        output_dir=Path("out"),
        data=[schema.DataEntry(path=Path("a"), repeat=2), schema.DataEntry(path=Path("b"))],
        warmup_steps=3,
    )


def test_paths_may_be_given_as_such_within_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[schema.TrainConfig] = []
    monkeypatch.setattr("llavaforge.training.run.train", configs.append)
    llavaforge.train(
        model_name_or_path="model",
        output_dir=Path("out"),
        stages=[{"name": "only", "model_name_or_path": Path("other"), "data_path": Path("data")}],
        data_path="data",
    )
    assert configs[0].stages == [{"name": "only", "model_name_or_path": "other", "data_path": "data"}]


def keys_of(result: type) -> set[str]:
    return set(get_type_hints(result))


def test_make_shapes(tmp_path: Path) -> None:
    result = llavaforge.make_shapes(output_dir=tmp_path / "shapes", num_samples=4)
    assert result.keys() == keys_of(llavaforge.MakeShapesResult)
    assert result["train"].keys() == keys_of(llavaforge.ShapesSplit)
    assert result["train"]["num_images"] == len(list((tmp_path / "shapes/train/images").iterdir())) == 4


@pytest.mark.parametrize("kind", [str, Path])
def test_customize_model(
    kind: Callable[[Path], str | Path], tiny_clip: Path, tiny_lm: Callable[[str], Path], tmp_path: Path
) -> None:
    result = llavaforge.customize_model(
        vision_tower=kind(tiny_clip), language_model=kind(tiny_lm("qwen2")), output_dir=kind(tmp_path / "model")
    )
    assert result.keys() == keys_of(llavaforge.CustomizeModelResult)
    assert result["output_dir"] == str(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()


def test_train_evaluate_and_export_return_the_documented_keys(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    trained = llavaforge.train(
        model_name_or_path=tiny_llava,
        data_path=shapes / "train",
        output_dir=tmp_path / "run",
        train_type="projector",
        max_steps=1,
        dataloader_num_workers=0,
        bf16=False,
    )
    assert trained.keys() == keys_of(llavaforge.TrainResult)
    final = tmp_path / "run" / "final"
    questions = shapes / "heldout" / "questions.json"
    evaluated = llavaforge.evaluate(
        model_name_or_path=final, data_path=questions, max_samples=2, dataloader_num_workers=0, bf16=False
    )
    assert evaluated.keys() == keys_of(llavaforge.EvaluateResult)
    exported = llavaforge.export(checkpoint=final, output_dir=tmp_path / "exported")
    assert exported.keys() == keys_of(llavaforge.ExportResult)


def test_check_preview_and_slurm_return_the_documented_keys(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    checked = llavaforge.check(data_path=shapes / "train", check_images=False)
    assert checked.keys() == keys_of(llavaforge.DataCheckResult)
    shown = llavaforge.preview(model_name_or_path=tiny_llava, data_path=shapes / "train", num_samples=1)
    assert shown.keys() == keys_of(llavaforge.DataPreviewResult)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model_name_or_path: model, data_path: data, output_dir: out}")
    written = llavaforge.slurm(recipe=recipe, output=tmp_path / "train.sh")
    assert written.keys() == keys_of(llavaforge.SlurmResult)


GOOD = """
from pathlib import Path

import llavaforge


def main() -> None:
    shapes: llavaforge.MakeShapesResult = llavaforge.make_shapes(output_dir=Path("shapes"), num_samples=10)
    try:
        result = llavaforge.train(
            model_name_or_path="model",
            data=[{"path": Path(shapes["output_dir"]), "repeat": 2}],
            output_dir="run",
            train_type="projector",
        )
    except (llavaforge.UserError, llavaforge.StoppedEarly) as error:
        raise SystemExit(str(error)) from None
    print(result["train_loss"])
"""


def mypy(script: Path) -> subprocess.CompletedProcess[str]:
    """Check a user's script; llavaforge's own files are not its business, as if they were in site-packages."""
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={script.parent}"]
    environment = os.environ | {"MYPYPATH": str(SRC)}
    return subprocess.run([*command, script], cwd=script.parent, env=environment, capture_output=True, text=True)


def test_a_type_checker_sees_the_functions_and_passes_the_readmes_example(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    (readme,) = re.findall(r"```python\n(import llavaforge\n.*?)```", USING.read_text(), flags=re.S)
    for good in (GOOD, readme):
        script.write_text(good)
        checked = mypy(script)
        assert checked.returncode == 0, checked.stdout
    faults = {
        "num_samples=10": ("num_sample=10", 'Unexpected keyword argument "num_sample" for "make_shapes"'),
        '"projector"': ('"projektor"', 'Argument "train_type" to "train" has incompatible type'),
        'result["train_loss"]': ('result["trainloss"]', 'TypedDict "TrainResult" has no key "trainloss"'),
    }
    bad = GOOD
    for right, (wrong, _) in faults.items():
        bad = bad.replace(right, wrong)
    script.write_text(bad)
    found = mypy(script).stdout
    assert found.count("error:") == len(faults), found
    for _, message in faults.values():
        assert message in found
