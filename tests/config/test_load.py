"""A recipe is read whole or refused in a sentence that names it; nothing in it is guessed or grows without bound."""

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llavaforge.cli import main, parse
from llavaforge.config.load import read_recipe
from llavaforge.config.schema import TrainConfig
from llavaforge.errors import UserError

BOMB = "system_prompt:\n- &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"- &a{number} [{','.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 9)
)

REFUSED: dict[str, tuple[bytes, str]] = {
    "a key twice": (b"learning_rate: 0.001\nlearning_rate: 0.5\n", r"`learning_rate` stands twice"),
    "a key twice in a stage": (b"stages:\n- name: a\n  seed: 1\n  seed: 2\n", r"`seed` stands twice"),
    "Latin-1": ("system_prompt: Grüße\n".encode("latin-1"), "not valid YAML in UTF-8"),
    "no mapping": (b"- a\n", "a recipe is a mapping"),
    "a key that is no text": (b"1: 2\n", "a recipe is a mapping"),
    "empty": (b"", "a recipe is a mapping"),
    "aliases without bound": (BOMB.encode(), "its aliases make more than"),
    "an alias of itself": (b"data: &a [*a]\n", "an alias stands for what it is part of"),
    "too deep": (b"data: " + b"[" * 5000, "not a recipe|not valid YAML"),
    "code": (b"seed: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    "no date": (b"job_name: 2026-13-45\n", "not a recipe"),
    "too large": (b"# " + b"x" * 1_000_000, "which is no recipe"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_recipe_is_refused_at_once(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = REFUSED[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    begin = time.monotonic()
    with pytest.raises(UserError, match=expected) as caught:
        read_recipe(path)
    assert time.monotonic() - begin < 20
    assert str(path) in str(caught.value) and len(str(caught.value)) < 2000
    assert main(["train", str(path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_unicode_encoding_that_yaml_knows_is_read(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes("system_prompt: Grüße 你好\n".encode(encoding))
    assert read_recipe(path) == {"system_prompt": "Grüße 你好"}


def test_merge_keys_and_aliases_are_plain_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "stages:\n- &one {name: one, seed: 1}\n- {<<: *one, name: two}\n- {<<: *one, name: three, seed: 3}\n"
    )
    seeds = {stage["name"]: stage["seed"] for stage in read_recipe(path)["stages"]}
    assert seeds == {"one": 1, "two": 1, "three": 3}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), st.text("ab:-[]{}&*!|>'\"%@`#,\n 01.~<", max_size=120).map(str.encode)))
def test_whatever_bytes_a_recipe_holds_it_is_a_mapping_or_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    try:
        values = read_recipe(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert values == yaml.safe_load(content)


NUMBERS = (
    "--learning_rate=1e400", "--learning_rate=nan", "--weight_decay=inf", "--seed=4294967296", "--seed=-1",
    "--global_batch_size=99999999999999999999", "--num_train_epochs=inf", "--max_length=1e30", "--lora_r=2000000000",
    "--stuck_timeout_s=1e300", "--adam_epsilon=-1", "--save_total_limit=0",
)  # fmt: skip


@pytest.mark.parametrize("flag", NUMBERS)
def test_numbers_that_cannot_work_are_refused(flag: str) -> None:
    name = flag[2:].split("=")[0]
    with pytest.raises(UserError, match=f"`{name}` = "):
        parse("train", ["--model_name_or_path=m", "--data_path=d", "--output_dir=o", flag])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(TrainConfig.model_fields)), st.text(max_size=30))
def test_whatever_is_given_for_an_option_is_a_value_or_a_sentence(name: str, text: str) -> None:
    arguments = {"model_name_or_path": "m", "data_path": "d", "output_dir": "o"} | {name: text}
    try:
        parse("train", [f"--{key}={value}" for key, value in arguments.items()])
    except UserError as error:
        assert len(str(error)) < 2000


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/x", "a/b", ".hidden", "final", "", "a\nb", "x" * 200])
def test_a_stage_is_named_like_a_folder_of_its_own(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "m", "data_path": "d", "stages": [{"name": name}]}))
    with pytest.raises(UserError, match=r"its name is that of a folder|needs a `name`"):
        parse("data check", [str(path)])


def test_stages_have_no_stages(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: m\ndata_path: d\nstages:\n- {name: a, stages: [{name: b}]}\n")
    with pytest.raises(UserError, match="has `stages` of its own"):
        parse("data check", [str(path)])


def test_an_option_of_several_types_is_refused_in_one_sentence() -> None:
    with pytest.raises(UserError) as refused:
        parse(
            "train", [*"--model_name_or_path=m --data_path=d --output_dir=o".split(), "--gradient_checkpointing=some"]
        )
    told = str(refused.value)
    assert told.count("gradient_checkpointing") == 1
    assert told.endswith("'some': Input should be a valid boolean, or a valid integer, or 'auto'.")
