"""Tiny random parts of every family, with a byte-level tokenizer made offline. Used by the fixtures of conftest.py."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.convert_slow_tokenizer import generate_merges
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% elif message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CORPUS = ["What is in the picture? A red square and a blue circle.", "user assistant system image answer question"] * 4

# 256 bytes and some merges; the special tokens follow. The embedding has room for more.
NUM_TOKENS, VOCAB_SIZE = 300, 384

_SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,  # lively weights: a lost setting must show in the logits
    bos_token_id=None,
    eos_token_id=NUM_TOKENS + 2,
    pad_token_id=None,
)

FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {}),
    "qwen2_tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2_sliding": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "llama": (LlamaConfig, {}),
    "llama3_rope": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": (MistralConfig, {"sliding_window": 8}),
    "mistral_full": (MistralConfig, {"sliding_window": None}),
    "gemma": (GemmaConfig, {"head_dim": 8, "tie_word_embeddings": True}),
    "phi3": (Phi3Config, {"sliding_window": 8}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "tie_word_embeddings": True}),
    "phi": (PhiConfig, {}),
}


_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), bytes_alone])


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS: dict[str, pre_tokenizers.PreTokenizer] = {
    "gpt-2": _GPT2,
    "qwen2": _split(_QWEN2),
    "llama-bpe": _split(_LLAMA3),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
}
"""By llama.cpp's names."""


def save_tokenizer(
    folder: Path, *, chat_template: str | None = CHATML, pad: bool = True, pre_tokenizer: str = "gpt-2"
) -> PreTrainedTokenizerFast:
    """Save a tokenizer with `<|endoftext|>`, `<|im_start|>` and `<|im_end|>` as ids 300, 301 and 302."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre_tokenizer == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=NUM_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == NUM_TOKENS
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>" if pad else None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=chat_template,
    )
    fast.save_pretrained(folder)
    return fast


SPACES = ("prepend", "first", "always", "never")


def save_sentencepiece(
    folder: Path,
    spaces: str = "first",
    *,
    corpus: Iterable[str] = CORPUS,
    num_tokens: int = NUM_TOKENS,
    chat_template: str = VICUNA,
) -> PreTrainedTokenizerFast:
    """Save a tokenizer of about so many tokens, as transformers makes it of Llama 2's.

    `spaces` is one of `SPACES`: where it puts spaces of its own.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    unknown = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=num_tokens - len(unknown), show_progress=False)
    trained.train_from_iterator(corpus, trainer)
    content = json.loads(trained.to_str())["model"]
    characters = sorted(text for text in content["vocab"] if len(text) == 1)
    merged = list(dict.fromkeys(["▁▁", "▁▁▁▁", *("".join(pair) for pair in content["merges"])]))
    vocabulary = {text: number for number, text in enumerate([*unknown, *merged, *characters])}
    merges = generate_merges(vocabulary, {text: -number for number, text in enumerate(merged)})
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replaced = normalizers.Replace(" ", "▁")
    if spaces == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced])
    elif spaces == "never":
        tokenizer.normalizer = normalizers.Sequence([replaced])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        chat_template=chat_template,
    )
    fast.save_pretrained(folder)
    return fast


def save_language_model(
    folder: Path, family: str = "qwen2", *, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Save a random language model of a family of `FAMILIES`, with its tokenizer."""
    torch.manual_seed(1)
    config_class, settings = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(config_class(**{**_SIZES, **settings, **overrides}))
    with torch.no_grad():  # biases and norms start equal: make every tensor tell where it landed
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def _vision_sizes(image_size: int, patch_size: int) -> dict[str, Any]:
    return dict(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=image_size,
        patch_size=patch_size,
    )


def save_clip(
    folder: Path,
    *,
    whole: bool = True,
    image_size: int = 28,
    patch_size: int = 14,
    dtype: torch.dtype = torch.float32,
    processor: bool = True,
) -> Path:
    """Save a random CLIP (or its vision model alone) with its image processor."""
    torch.manual_seed(2)
    vision = _vision_sizes(image_size, patch_size)
    if whole:
        text = dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
            eos_token_id=2,
        )  # fmt: skip
        model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**vision))
    model.to(dtype).save_pretrained(folder)
    if processor:
        crop = {"height": image_size, "width": image_size}
        CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=crop).save_pretrained(folder)
    return folder


def save_siglip(folder: Path, *, image_size: int = 32, patch_size: int = 8) -> Path:
    """Save a random SigLIP vision model with its image processor."""
    torch.manual_seed(3)
    SiglipVisionModel(SiglipVisionConfig(**_vision_sizes(image_size, patch_size))).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": image_size, "width": image_size}).save_pretrained(folder)
    return folder
