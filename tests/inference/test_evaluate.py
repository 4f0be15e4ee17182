"""Evaluation measures what training measures, and answers see what training saw."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llavaforge.answers.generate import Answerer, Question
from llavaforge.answers.metrics import exact_match
from llavaforge.config.schema import ChatConfig, EvaluateConfig, SampleOptions, TrainConfig
from llavaforge.data.rows.turns import Turn
from llavaforge.errors import UserError
from llavaforge.inference.chat import chat
from llavaforge.inference.evaluate import evaluate
from llavaforge.model.load import LoadedModel, load_model
from llavaforge.model.step import StepModule
from llavaforge.training.run import train
from train_tools import open_packs, pack_of, train_config


def test_loss_is_the_held_out_loss_of_training(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    config = train_config(
        tiny_llava, shapes / "train", tmp_path / "run", max_steps=3, eval_data_path=shapes / "heldout"
    )
    trained = train(config)
    found = evaluate(
        EvaluateConfig(
            model_name_or_path=str(tmp_path / "run" / "final"), data_path=shapes / "heldout", bf16=False,
            dataloader_num_workers=0, output_dir=tmp_path / "out",
        )
    )  # fmt: skip
    assert found["loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
    assert found["exact_match"] is None  # captions are no short answers
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == found["num_samples"] == 100
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == found
    assert (found["data_path"], found["blank_image"]) == (str(shapes / "heldout"), False)
    with pytest.raises(UserError, match="is a training run's folder"):
        evaluate(EvaluateConfig(model_name_or_path="m", data_path=shapes, output_dir=tmp_path / "run"))


@pytest.mark.parametrize("train_type", ["projector", "use_lora"])
def test_what_a_run_held_out_is_measured_as_it_was_there(
    train_type: str, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    """Of two data sets, in another style than `evaluate` has by itself, of any seed, from `final` and a checkpoint."""
    entries = [
        {"path": shapes / "train" / "chat.json"},
        {"path": shapes / "train" / "questions.json", "max_samples": 40},
    ]
    of_one = train_config(
        tiny_llava, shapes / "train", tmp_path / "run", train_type=train_type, max_steps=3, validation_split=10,
        prompt_style="plain", seed=5, save_steps=3,
    )  # fmt: skip
    values = of_one.model_dump(exclude_unset=True, exclude={"data_path"})
    config = TrainConfig.model_validate(values | {"data": entries})
    trained = train(config)
    for name in ("final", "checkpoint-3"):
        config_of_it = EvaluateConfig(
            model_name_or_path=str(tmp_path / "run" / name), held_out=True, bf16=False, dataloader_num_workers=0,
            output_dir=tmp_path / "out", metrics=["exact_match"], cache_dir=config.cache_dir,
        )  # fmt: skip
        found = evaluate(config_of_it)
        assert found["loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
        assert (found["num_samples"], found["held_out"]) == (10, True)
        assert found["data_path"] == ", ".join(str(entry["path"]) for entry in entries)
        assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 10
        assert evaluate(config_of_it.model_copy(update={"max_samples": 4}))["num_samples"] == 4


def test_nothing_else_is_taken_for_what_a_run_held_out(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    rows = json.loads((shapes / "train" / "questions.json").read_text())[:30]
    data, held_out = tmp_path / "questions.json", tmp_path / "held-out.json"
    data.write_text(json.dumps(rows))
    held_out.write_text(json.dumps(rows[:4]))

    def run(name: str, **options: Any) -> EvaluateConfig:
        images = shapes / "train" / "images"
        values = {"image_folder": images, "max_steps": 2, "save_steps": 1} | options
        train(train_config(tiny_llava, data, tmp_path / name, **values))
        return of(tmp_path / name / "final")

    def of(folder: Path) -> EvaluateConfig:
        return EvaluateConfig(model_name_or_path=str(folder), held_out=True, bf16=False, dataloader_num_workers=0)

    with pytest.raises(UserError, match="held nothing out"):
        evaluate(run("none"))
    with pytest.raises(UserError, match="no run's folder"):
        evaluate(of(tiny_llava))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        evaluate(of(tmp_path / "nowhere"))
    for own in ({"data_path": data}, {"prompt_style": "plain"}, {"image_folder": data}):
        with pytest.raises(ValueError, match=f"leave {next(iter(own))} out"):
            EvaluateConfig(model_name_or_path="m", held_out=True, **own)
    split, other = run("split", validation_split=6), run("other", validation_split=8)
    assert (evaluate(split)["num_samples"], evaluate(other)["num_samples"]) == (6, 8)
    beside = tmp_path / "other" / "of-split"
    shutil.copytree(tmp_path / "split" / "final", beside)
    assert evaluate(of(beside))["num_samples"] == 6  # in the folder of another run, from which it has the path alone
    entry = run("entry", eval_data_path=held_out)
    assert evaluate(entry)["num_samples"] == 4
    held_out.write_text(json.dumps(rows[4:8]))
    with pytest.raises(UserError, match=r"held-out.json has been edited or written anew since the run"):
        evaluate(entry)
    data.write_text(json.dumps(rows[1:]))
    with pytest.raises(UserError, match=r"questions.json has been edited or written anew since the run"):
        evaluate(split)
    changed = run("split", validation_split=6, max_steps=3, allow_changes=["data"])
    with pytest.raises(UserError, match="may have trained on some of the records"):
        evaluate(changed)
    with pytest.raises(UserError, match="has been edited"):  # before that, and of the former file
        evaluate(of(tmp_path / "split" / "checkpoint-2"))
    data.write_text(json.dumps(rows))
    assert evaluate(of(tmp_path / "split" / "checkpoint-2"))["num_samples"] == 6
    data.unlink()
    with pytest.raises(UserError, match=r"held_out: .*no such file .*--data_path with data that the model has"):
        evaluate(other)


def test_loss_of_each_sample_is_its_own(loaded_llava: LoadedModel, shapes: Path, tmp_path: Path) -> None:
    data = shapes / "heldout" / "questions.json"
    evaluate(
        EvaluateConfig(
            model_name_or_path=str(loaded_llava.path), data_path=data, bf16=False, max_samples=5,
            dataloader_num_workers=0, output_dir=tmp_path / "out", metrics=["none"],
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    _, dataset = open_packs(loaded_llava, train_config(loaded_llava.path, data, tmp_path))
    module = StepModule(loaded_llava.model, loaded_llava.preprocessing)
    for number, line in enumerate(lines):
        with torch.no_grad():
            expected = module(pack_of(dataset, number)).item() / line["num_supervised"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)


def test_batched_answers_equal_single_ones_and_the_processors_way(tiny_llava: Path, shapes: Path) -> None:
    loaded = load_model(str(tiny_llava))
    StepModule(loaded.model, loaded.preprocessing)
    from PIL import Image

    files = sorted((shapes / "heldout" / "images").iterdir())[:3]
    images = [Image.open(file).convert("RGB") for file in files]
    prompts = ["What?", "A much longer question about the image, is it?", "Describe the image."]
    questions = [
        Question((Turn("user", f"<image>\n{prompt}"),), [loaded.preprocessing(image)])
        for prompt, image in zip(prompts, images, strict=True)
    ]
    answerer = Answerer(loaded, SampleOptions(), max_new_tokens=8)
    together = answerer(questions)
    assert together == [answerer([question])[0] for question in questions]
    stock = load_model(str(tiny_llava)).model
    for prompt, image, found in zip(prompts, images, together, strict=True):
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        text = loaded.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = loaded.processor(images=image, text=text, return_tensors="pt")
        output = stock.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = loaded.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.strip() == found


def test_the_image_token_is_never_generated(tiny_llava: Path) -> None:
    loaded = load_model(str(tiny_llava))
    StepModule(loaded.model, loaded.preprocessing)
    # `<image>` is by far the likeliest token everywhere
    favoured = loaded.model.lm_head.register_forward_hook(
        lambda _module, _inputs, output: output.index_fill(-1, torch.tensor([loaded.image_token_id]), 1e4)
    )
    answer = Answerer(loaded, SampleOptions(), max_new_tokens=4)([Question((Turn("user", "Hi"),))])
    favoured.remove()
    assert answer[0] != ""  # skip_special_tokens would hide four `<image>` tokens as an empty answer
    ids = loaded.processor.tokenizer(answer[0], add_special_tokens=False).input_ids
    assert loaded.image_token_id not in ids


def test_a_grey_image_replaces_every_picture(loaded_llava: LoadedModel, shapes: Path, tmp_path: Path) -> None:
    losses = [
        evaluate(
            EvaluateConfig(
                model_name_or_path=str(loaded_llava.path), data_path=shapes / "heldout", bf16=False, max_samples=4,
                dataloader_num_workers=0, blank_image=blank,
            )
        )["loss"]
        for blank in (False, True)
    ]  # fmt: skip
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("answer", "reference", "match"),
    [("Red.", "red", True), (" two  cats", "Two cats", True), ("reddish", "red", False), ("", "red", False)],
)
def test_exact_match_ignores_case_and_punctuation_only(answer: str, reference: str, match: bool) -> None:
    assert exact_match(answer, [reference]) == match


def test_chat_answers_on_stdout(tiny_llava: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = next((shapes / "heldout" / "images").iterdir())
    chat(ChatConfig(model_name_or_path=str(tiny_llava), image=image, prompt="What?", max_new_tokens=4))
    one = capsys.readouterr().out
    chat(ChatConfig(model_name_or_path=str(tiny_llava), image=image, prompt="<image>\nWhat?", max_new_tokens=4))
    assert capsys.readouterr().out == one != ""


def test_a_record_that_was_cut_is_evaluated_as_it_was_cut_and_the_others_keep_their_images(
    tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    images = sorted((shapes / "heldout" / "images").iterdir())
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(shapes / "heldout" / "images")

    def row(*pairs: tuple[str, str], first_image: int) -> dict[str, object]:
        turns = []
        for question, answer in pairs:
            turns += [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        names = [image.name for image in images[first_image : first_image + len(pairs)]]
        return {"id": str(first_image), "image": names, "conversations": turns}

    long = row(("What colour is it?", "red"), ("And what of this? " * 20, "blue"), first_image=0)
    rows = [long, *(row(("What colour is it?", "red"), first_image=number) for number in (2, 3))]
    answers = {}
    for name, mine in (("together", rows), ("without", [row(("What colour is it?", "red"), first_image=0), *rows[1:]])):
        (data / "chat.json").write_text(json.dumps(mine))
        evaluate(
            EvaluateConfig(
                model_name_or_path=str(tiny_llava), data_path=data, bf16=False, dataloader_num_workers=0,
                max_length=120, output_dir=tmp_path / name, metrics=["exact_match"], max_new_tokens=4,
            )
        )  # fmt: skip
        lines = (tmp_path / name / "samples.jsonl").read_text().splitlines()
        answers[name] = [json.loads(line) for line in lines]
    assert answers["together"][0]["question"] == "What colour is it?" and answers["together"][0]["reference"] == "red"
    for found, expected in zip(answers["together"], answers["without"], strict=True):
        assert found["answer"] == expected["answer"] and found["image"] == expected["image"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
