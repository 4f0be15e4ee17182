import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig, LlavaForConditionalGeneration

from llavaforge.errors import UserError
from llavaforge.folders import differences
from llavaforge.model_folder.names import to_file_name, to_module_name
from llavaforge.model_folder.read import read_config, read_generation_config, read_processor
from llavaforge.model_folder.tensors import open_tensors, write_shards
from llavaforge.model_folder.verify import load_verified
from llavaforge.model_folder.write import update_model_folder, write_model_folder

LINEAR_1 = "model.multi_modal_projector.linear_1.weight"


def read(path: Path):
    return json.loads(path.read_text())


def as_llava_hf(folder: Path, source: Path) -> Path:
    """Turn a folder into what llava-hf's hub repositories hold: newer names, a buffer, fewer and other files."""
    files = open_tensors(source)
    tensors = {
        to_module_name(name).replace("vision_tower.", "vision_tower.vision_model."): files[name] for name in files
    }
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    folder.mkdir()
    write_shards(folder, "model", tensors.items())
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        shutil.copy(source / name, folder)
    tokenizer_config = read(source / "tokenizer_config.json")
    for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        tokenizer_config.pop(key)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    template = (source / "chat_template.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return folder


def test_a_folder_holds_every_file_and_field_that_other_tools_look_for(tiny_llava: Path):
    config = read(tiny_llava / "config.json")
    text = config["text_config"]
    assert text["architectures"] == ["Qwen2ForCausalLM"] and config["image_token_index"] == 303
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 10000.0
    assert config["dtype"] == config["torch_dtype"] == text["torch_dtype"] == "float32"
    assert config["tie_word_embeddings"] is text["tie_word_embeddings"] is False
    generation = read(tiny_llava / "generation_config.json")
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (302, 300)
    assert generation["suppress_tokens"] == [303]
    processor = read(tiny_llava / "processor_config.json")
    assert (processor["patch_size"], processor["num_additional_image_tokens"]) == (14, 1)
    assert processor["vision_feature_select_strategy"] == "default"
    assert read(tiny_llava / "preprocessor_config.json")["image_processor_type"] == "CLIPImageProcessor"
    assert (tiny_llava / "chat_template.jinja").is_file() and (tiny_llava / "tokenizer.json").is_file()
    assert differences(tiny_llava) == []


def test_no_private_path_is_written(tiny_llava: Path):
    for path in tiny_llava.glob("*.json"):
        assert str(tiny_llava.parent) not in path.read_text(), path.name


def test_the_tokenizer_has_the_three_fields_and_a_class_that_transformers_4_knows(tiny_llava: Path):
    content = read(tiny_llava / "tokenizer_config.json")
    assert content["added_tokens_decoder"]["303"] == {
        "content": "<image>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    assert content["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>", "<image>"]
    assert content["extra_special_tokens"] == {"image_token": "<image>"}
    assert content["tokenizer_class"] in ("Qwen2Tokenizer", "PreTrainedTokenizerFast")
    for tokenizer in (AutoTokenizer.from_pretrained(tiny_llava), AutoProcessor.from_pretrained(tiny_llava).tokenizer):
        assert tokenizer.encode("<image>") == [303] and "<image>" in tokenizer.all_special_tokens
        assert tokenizer.decode([303, 301], skip_special_tokens=True) == ""
        assert tokenizer.extra_special_tokens == ["<|im_start|>", "<|im_end|>", "<image>"]


def test_config_json_means_to_transformers_what_it_was_written_from(tiny_llava: Path):
    config = AutoConfig.from_pretrained(tiny_llava)
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    assert model.dtype == torch.float32
    assert config.text_config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    assert config.vision_feature_layer == -2 and config.image_seq_length == 4


def test_the_image_token_is_never_generated(tiny_llava: Path):
    model, processor = load_verified(tiny_llava), AutoProcessor.from_pretrained(tiny_llava)
    inputs = processor(images=Image.new("RGB", (40, 30)), text="<image>\nWhat?", return_tensors="pt")
    with torch.no_grad():  # a head that wants nothing but <image> here
        last_hidden = model.model(**inputs).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[303] = last_hidden
        assert model(**inputs).logits[0, -1].argmax() == 303
    new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert len(new) > 0 and 303 not in new.tolist()


def test_the_token_that_ends_an_answer_in_the_template_stops_generation(tiny_llava: Path, tmp_path: Path):
    base = Path(shutil.copytree(tiny_llava, tmp_path / "base"))
    generation = read(base / "generation_config.json")
    (base / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 300}))
    update_model_folder(tmp_path / "out", base, {})
    assert read(tmp_path / "out/generation_config.json")["eos_token_id"] == [300, 302]
    for ending, expected in (("'<|endoftext|>'", 300), ("'<|im_start|>'", [300, 301]), ("''", [300, 302])):
        (base / "chat_template.jinja").write_text(f"{{{{ messages[-1]['content'] + {ending} }}}}")
        update_model_folder(tmp_path / "out", base, {}, overwrite=True)
        assert read(tmp_path / "out/generation_config.json")["eos_token_id"] == expected


def test_an_update_replaces_what_changed_and_keeps_every_other_byte(tiny_llava: Path, tmp_path: Path):
    before = open_tensors(tiny_llava)
    new = torch.ones(before.shape(to_file_name(LINEAR_1)), dtype=torch.float64)
    update_model_folder(tmp_path / "mapping", tiny_llava, {LINEAR_1: new})
    update_model_folder(
        tmp_path / "function", tiny_llava, lambda name, tensor: tensor * 0 + 1 if name == LINEAR_1 else tensor
    )
    for folder in (tmp_path / "mapping", tmp_path / "function"):
        after = open_tensors(folder)
        assert list(after) == list(before)
        for name in before:
            expected = new.float() if name == to_file_name(LINEAR_1) else before[name]
            assert after[name].dtype == before.dtype(name) and torch.equal(after[name], expected), name
        load_verified(folder)
        for path in tiny_llava.glob("*.json"):
            if path.name not in ("manifest.json", "tokenizer_config.json"):
                assert read(folder / path.name) == read(path), path.name
        assert (folder / "chat_template.jinja").read_text() == (tiny_llava / "chat_template.jinja").read_text()


def test_an_update_of_an_unknown_tensor_or_shape_leaves_nothing_behind(tiny_llava: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no tensor `model.nothing`"):
        update_model_folder(tmp_path / "out", tiny_llava, {"model.nothing": torch.zeros(1)})
    with pytest.raises(ValueError, match="linear_1"):
        update_model_folder(tmp_path / "out", tiny_llava, {LINEAR_1: torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_llava_hf_style_folder_is_normalised_on_the_way(tiny_llava: Path, tmp_path: Path):
    base = as_llava_hf(tmp_path / "hf", tiny_llava)
    update_model_folder(tmp_path / "out", base, {})
    expected, found = open_tensors(tiny_llava), open_tensors(tmp_path / "out")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    load_verified(tmp_path / "out")
    for name in ("tokenizer_config.json", "processor_config.json", "config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).is_file(), name
    assert read(tmp_path / "out/tokenizer_config.json")["added_tokens_decoder"]["303"]["special"] is True


def test_a_full_folder_is_replaced_only_with_overwrite_and_only_when_the_new_one_is_complete(
    tiny_llava: Path, tmp_path: Path
):
    output_dir = tmp_path / "out"
    update_model_folder(output_dir, tiny_llava, {})
    before = (output_dir / "model.safetensors").read_bytes()
    new = {LINEAR_1: torch.ones(open_tensors(tiny_llava).shape(to_file_name(LINEAR_1)))}
    with pytest.raises(UserError, match=r"out: is not empty.*--overwrite"):
        update_model_folder(output_dir, tiny_llava, new)

    def broken(name, tensor):
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        update_model_folder(output_dir, tiny_llava, broken, overwrite=True)
    assert (output_dir / "model.safetensors").read_bytes() == before and list(tmp_path.iterdir()) == [output_dir]
    update_model_folder(output_dir, tiny_llava, new, overwrite=True)
    assert (output_dir / "model.safetensors").read_bytes() != before and list(tmp_path.iterdir()) == [output_dir]
    assert differences(output_dir) == []


def test_overwrite_takes_away_nothing_but_a_model_folder(tiny_llava: Path, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"replaces a model folder only"):
        update_model_folder(tmp_path, tiny_llava, {}, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


KILLED = """
import sys, time
from pathlib import Path
from llavaforge.model_folder.write import update_model_folder
def slow(name, tensor):
    print(name, flush=True)
    time.sleep(0.05)
    return tensor
update_model_folder(Path(sys.argv[1]), Path(sys.argv[2]), slow)
"""


def test_a_kill_half_way_leaves_no_folder_and_the_next_run_clears_up(tiny_llava: Path, tmp_path: Path):
    output_dir = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(output_dir), str(tiny_llava)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None and process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output_dir.exists() and list(tmp_path.glob(".llavaforge-*"))
    update_model_folder(output_dir, tiny_llava, {})
    assert list(tmp_path.iterdir()) == [output_dir]
    load_verified(output_dir)


def test_scaled_rope_is_written_for_older_readers_and_read_back_the_same(tmp_path: Path, tiny_llava: Path):
    config = read_config(tiny_llava)
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    config.text_config.rope_parameters = dict(scaled)
    files = open_tensors(tiny_llava)
    write_model_folder(
        tmp_path / "out",
        config=config,
        processor=read_processor(tiny_llava),
        generation_config=GenerationConfig(eos_token_id=[302, 300]),
        tensors=((name, files[name]) for name in files),
    )
    text = read(tmp_path / "out/config.json")["text_config"]
    assert text["rope_theta"] == 500.0 and text["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert AutoConfig.from_pretrained(tmp_path / "out").text_config.rope_parameters == scaled
    assert read_generation_config(tmp_path / "out").eos_token_id == [302, 300]


def test_others_may_read_what_the_umask_lets_them(tiny_llava: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in tiny_llava.iterdir()}
    assert set(modes.values()) == {tiny_llava.stat().st_mode & 0o666}, modes
