"""Model folders with damaged, ill-typed or hostile small files: opened as they are, or refused by name."""

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llavaforge.cli import main
from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.data.faults import RecordError
from llavaforge.data.index.open import sample_builder
from llavaforge.data.rows.records import Record
from llavaforge.data.rows.turns import Turn
from llavaforge.errors import UserError
from llavaforge.join.parts import customize_model
from llavaforge.model.load import load_model, load_without_weights
from llavaforge.model_folder.tensors import open_tensors
from mutations import draw_damaged

SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
    "processor_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
DEEP = b"[" * 100_000


@pytest.fixture
def folder(tiny_llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llava, tmp_path / "model"))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_small_file_holds_the_folder_opens_or_is_refused_by_name(folder: Path, data: st.DataObject) -> None:
    path = folder / data.draw(st.sampled_from(SMALL_FILES))
    whole = path.read_bytes()
    path.write_bytes(draw_damaged(data, whole, path.suffix == ".json"))
    try:
        loaded = load_without_weights(str(folder))
        builder = sample_builder(loaded.processor, loaded.num_image_tokens, _options())
        builder.build(Record("", (), (Turn("user", "What?"), Turn("assistant", "A cat."))))
    except (UserError, RecordError) as error:
        assert len(str(error)) < 3000
    finally:
        path.write_bytes(whole)


def _options() -> Any:
    from llavaforge.config.schema import SampleOptions

    return SampleOptions()


@pytest.mark.parametrize("name", SMALL_FILES)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe\x00", DEEP], ids=["empty", "cut", "list", "bytes", "deep"]
)
def test_a_broken_small_file_is_named_by_every_verb(
    content: bytes, name: str, folder: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_bytes(content)
    for verb in (
        ["train", f"--model_name_or_path={folder}", f"--data_path={shapes / 'train'}",
         f"--output_dir={tmp_path / 'run'}", "--max_steps=1", "--dataloader_num_workers=0", "--bf16=false"],
        ["customize-model", f"--vision_tower={folder}", f"--language_model={folder}",
         f"--output_dir={tmp_path / 'out'}"],
    ):  # fmt: skip
        code = main(verb)
        told = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in told, told[-2000:]
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


class Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (Path("PWNED"),))


@pytest.mark.parametrize("content", ["code", "text", "cut", "no tensors"])
def test_a_pickle_is_refused_without_advice_to_switch_safety_off(
    content: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    if content == "text":
        path.write_text("no pickle")
    elif content == "code":
        torch.save({"a": Payload()}, path)
    elif content == "cut":
        torch.save({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:500])
    else:
        path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"pytorch_model.bin: ") as caught:
        load_model(str(folder))
    assert "weights_only" not in str(caught.value) and "trust" not in str(caught.value)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", 3, None])
def test_an_index_names_no_file_outside_of_its_folder(name: Any, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match="not an index of shards"):
        open_tensors(folder)


ENDLESS = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
HUGE = "{{ 'a' * 100000000000 }}"


@pytest.mark.parametrize("beginning", [ENDLESS, HUGE], ids=["endless", "huge"])
def test_a_template_that_does_not_end_or_takes_all_memory_is_given_up(
    beginning: str, folder: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = beginning + (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template)
    begin = time.monotonic()
    arguments = ["train", f"--model_name_or_path={folder}", f"--data_path={shapes / 'train'}", "--max_steps=1"]
    assert main([*arguments, f"--output_dir={tmp_path / 'run'}", "--dataloader_num_workers=0"]) == 2
    assert "The chat template cannot render" in capsys.readouterr().err
    assert time.monotonic() - begin < 60


THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize("template", [THINKING, THINKING + "\n"], ids=["as it is", "with a last line"])
def test_a_served_prompt_begins_the_answer_as_training_did(
    template: str, tiny_clip: Path, tiny_lm: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "think.jinja").write_text(template)
    config = CustomizeModelConfig(
        vision_tower=str(tiny_clip), language_model=str(tiny_lm("qwen2")), output_dir=tmp_path / "model",
        chat_template=tmp_path / "think.jinja",
    )  # fmt: skip
    customize_model(config)
    processor = load_without_weights(str(tmp_path / "model")).processor
    builder = sample_builder(processor, 4, _options())
    question = [{"role": "user", "content": "What?"}]
    trained = builder.chat.prompt([Turn("user", "What?")])
    for options in ({}, {"enable_thinking": False}):
        served = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False, **options)
        assert served == trained and served.count("<think>") == 1


def test_the_models_own_special_tokens_in_texts_are_split_or_kept_and_counted(
    tiny_clip: Path, tiny_lm: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    from llavaforge.config.schema import SampleOptions

    lm = Path(shutil.copytree(tiny_lm("qwen2"), tmp_path / "lm"))
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|box_start|>"]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(lm)
    customize_model(
        CustomizeModelConfig(vision_tower=str(tiny_clip), language_model=str(lm), output_dir=tmp_path / "model")
    )
    processor = load_without_weights(str(tmp_path / "model")).processor
    record = Record("", (), (Turn("user", "Where?\0 <|im_end|>"), Turn("assistant", "<|box_start|>(1,2) <|im_end|> x")))
    samples = {}
    for choice in ("split", "keep"):
        builder = sample_builder(processor, 4, SampleOptions(special_tokens_in_text=choice))
        samples[choice] = builder.build(record)
        assert samples[choice].num_special_tokens == 1 and samples[choice].num_images == 0
    box, end = (processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|box_start|>", "<|im_end|>"))
    assert box not in samples["split"].ids and samples["keep"].ids.count(box) == 1
    assert samples["split"].ids.count(end) == samples["keep"].ids.count(end) == 2  # the template's own
