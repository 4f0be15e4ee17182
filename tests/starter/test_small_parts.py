"""The shipped parts: small, stock, without remote code; the language model reads a scene told in words."""

import json
import random

import pytest
import torch
from PIL import Image
from tools.small_parts.small_language_model import (
    describe_as_notes,
    encode_dialogue,
    encode_quiz,
    sample_dialogue,
)
from tools.small_parts.small_tower import IMAGE_SIZE, PATCHES_PER_SIDE, patch_targets, spoil
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    Qwen2ForCausalLM,
)

from llavaforge.starter import SMALL_CLIP, SMALL_QWEN2
from llavaforge.starter.shapes import caption, questions, render, sample_scene

MAX_BYTES = 8_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMALL_QWEN2, trust_remote_code=False)


@pytest.fixture(scope="module")
def language_model():
    model = AutoModelForCausalLM.from_pretrained(SMALL_QWEN2, dtype=torch.float32, trust_remote_code=False)
    return model.eval()


@pytest.fixture(scope="module")
def tower():
    return CLIPVisionModel.from_pretrained(SMALL_CLIP, dtype=torch.float32).eval()


def test_both_parts_stay_small_and_hold_data_only():
    files = [path for folder in (SMALL_CLIP, SMALL_QWEN2) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".txt"}
    assert not any("auto_map" in json.loads(path.read_text()) for path in files if path.name == "config.json")


def test_tokenizer_is_qwens_in_small(tokenizer, language_model):
    specials = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert specials == [len(tokenizer) - 3, len(tokenizer) - 2, len(tokenizer) - 1]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert isinstance(language_model, Qwen2ForCausalLM)
    assert language_model.get_input_embeddings().num_embeddings > len(tokenizer), "no free row for <image>"
    assert language_model.generation_config.eos_token_id == specials[2]
    assert language_model.generation_config.pad_token_id == specials[0]
    strange = "Grüße, 世界 🙂\n\tx = 3.14"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange


def test_dialogues_are_written_as_the_chat_template_writes_them(tokenizer):
    turns = sample_dialogue(random.Random(0))
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    ids, said = encode_dialogue(tokenizer, turns)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) + "\n" == whole
    assert tokenizer.encode(whole)[:-1] == ids
    spoken = tokenizer.decode([token for token, own in zip(ids, said, strict=True) if own])
    assert spoken == "".join(f"{answer}<|im_end|>" for _, answer in turns)


def test_language_model_answers_about_a_scene_told_in_words(tokenizer, language_model):
    rng = random.Random(11)
    prompts, answers = [], []
    for _ in range(100):
        scene = sample_scene(rng, "heldout")
        question, answer = questions(scene, rng, 1)[0]
        message = {"role": "user", "content": f"{describe_as_notes(scene, rng)}\n{question}"}
        prompts.append(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
        answers.append(answer)
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    said = language_model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch.input_ids.shape[1] :]
    replies = tokenizer.batch_decode(said, skip_special_tokens=True)
    right = sum(reply == answer for reply, answer in zip(replies, answers, strict=True))
    assert right >= 90, [pair for pair in zip(prompts, answers, replies, strict=True) if pair[1] != pair[2]][:3]


def test_language_model_knows_no_image(tokenizer):
    assert "<image>" not in tokenizer.get_vocab()
    rng = random.Random(0)
    texts = [tokenizer.decode(encode_quiz(tokenizer, rng)[0]) for _ in range(100)]
    texts += [text for _ in range(100) for turn in sample_dialogue(rng) for text in turn]
    assert not any("<image>" in text for text in texts)


def test_a_quiz_supervises_its_answers_alone(tokenizer):
    ids, said = encode_quiz(tokenizer, random.Random(1))
    lines = tokenizer.decode(ids).splitlines()
    answers = tokenizer.decode([token for token, own in zip(ids, said, strict=True) if own]).splitlines()
    assert answers == lines[2::2]


def test_tower_and_processor_load_and_agree(tower):
    processor = AutoImageProcessor.from_pretrained(SMALL_CLIP, trust_remote_code=False)
    pixels = processor(images=Image.new("RGB", (120, 90), (128, 128, 128)), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    assert hidden[-2].shape == (1, 1 + PATCHES_PER_SIDE**2, tower.config.hidden_size)
    assert type(processor).__name__.startswith("CLIPImageProcessor")


def test_the_layer_llava_reads_tells_colour_and_shape_apart(tower):
    """A linear probe on 300 train scenes names colour and shape of each cell in unseen scenes."""
    processor = AutoImageProcessor.from_pretrained(SMALL_CLIP)
    rng = random.Random(12)

    def look(split, num_scenes):
        scenes = [sample_scene(rng, split) for _ in range(num_scenes)]
        pixels = processor(images=[render(scene) for scene in scenes], return_tensors="pt").pixel_values
        with torch.no_grad():
            features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)
        ones = torch.ones(len(features), 1)
        targets = torch.tensor([patch_targets(scene) for scene in scenes])
        return torch.cat([features, ones], 1), targets[:, 0].flatten(), targets[:, 1].flatten()

    seen, colours, shapes = look("train", 300)
    unseen, true_colours, true_shapes = look("heldout", 100)
    for known, true in ((colours, true_colours), (shapes, true_shapes)):
        probe = torch.linalg.lstsq(seen, torch.nn.functional.one_hot(known).float()).solution
        assert ((unseen @ probe).argmax(-1) == true).float().mean() > 0.9


def test_a_spoilt_scene_has_another_caption():
    rng = random.Random(13)
    for _ in range(300):
        scene = sample_scene(rng, "train")
        spoilt = spoil(scene, rng)
        assert caption(spoilt) != caption(scene)
        assert len(spoilt.objects) == len(scene.objects)
        assert len({thing.position for thing in spoilt.objects}) == len(spoilt.objects)
