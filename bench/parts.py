"""The model that all contenders train: two random parts of a given size, joined by `customize-model`.

Comes in: a size and the texts of the samples. Goes out: a model folder that plain transformers opens.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionModel, PreTrainedTokenizerFast, Qwen2ForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.join.parts import customize_model
from llavaforge.machine.random_model import ModelSize, text_config, vision_config

SYSTEM_PROMPT = "You are a helpful assistant."
# Qwen1.5-Chat's: ChatML with a default system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_model(folder: Path, size: ModelSize, texts: Sequence[str]) -> Path:
    """Write both parts below `folder` and join them.

    Returns:
        The joined model's folder.
    """
    torch.manual_seed(0)
    tower, language_model, joined = folder / "tower", folder / "language-model", folder / "joined"
    CLIPVisionModel(vision_config(size)).save_pretrained(tower)
    crop = {"height": size.image_size, "width": size.image_size}
    CLIPImageProcessorPil(size={"shortest_edge": size.image_size}, crop_size=crop).save_pretrained(tower)
    Qwen2ForCausalLM(text_config(size)).save_pretrained(language_model)
    make_tokenizer(size.vocab_size - 1, texts).save_pretrained(language_model)
    with contextlib.redirect_stdout(sys.stderr):  # its table of parameters is no result of ours
        customize_model(
            CustomizeModelConfig(vision_tower=str(tower), language_model=str(language_model), output_dir=joined)
        )
    return joined


def make_tokenizer(num_tokens: int, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most `num_tokens` tokens, learnt from the samples' own texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens - len(_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    markup = [f"system\n{SYSTEM_PROMPT}", "user\n", "assistant\n"] * 100
    tokenizer.train_from_iterator([*texts, *markup], trainer)
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )
