r"""The small Qwen2 of quickstart: its tokenizer, the text it reads, its training.

In: nothing but the generated world, told in words. Out: a folder that `AutoTokenizer` and
`AutoModelForCausalLM` open. One dialogue that it reads:

    system: You are a helpful assistant.
    user: A red circle at the top left and a blue star at the bottom left.\nWhat colour is the circle?
    assistant: red
    user: What shape is below the red circle?
    assistant: star

At first it reads quizzes: a scene of up to four objects and a question about every colour and shape in it, a question
or an answer per line, without roles. Then dialogues come in, and in the end there are only dialogues.
It never sees an image, an image token or an image feature. Tensors: B batch, T tokens, N supervised tokens.
"""

import copy
import json
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from llavaforge.starter.shapes import (
    CAPTION_OPENINGS,
    DESCRIBE_PROMPTS,
    Scene,
    caption,
    questions,
    sample_scene,
)

log = logging.getLogger(__name__)

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
NUM_TOKENS = 500
VOCAB_SIZE = 512
"""RowNumbers of the embedding; more than tokens, as in Qwen1.5, so that `<image>` finds a free row."""

MAX_POSITIONS = 1024
PATCHES_PER_CELL = 3
SAVE_STEPS = 250
QUIZZES_ONLY_UNTIL, QUIZZES_UNTIL = 0.1, 0.6
"""Shares of all steps between which dialogues take the place of quizzes."""

NUM_QUIZ_OBJECTS = (2, 3, 4)
"""More objects than in images: guessing pays less, and binding a colour to a shape is learnt sooner."""

USER_TEXT_WEIGHT = 0.1
"""Weight of the loss on what the user says; little of it can be foreseen."""

MUON_LEARNING_RATE, ADAMW_LEARNING_RATE = 0.004, 0.001
FALL_SHARE = 0.5
LOOK_BACK_TOKENS = (1, 1, 2, 3)
LOOK_BACK_STRENGTH = 5.5
FETCHED_SCALE, MATCH_SCALE = 0.35, 1.5

QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat template of Qwen1.5-Chat: ChatML with a default system turn."""

Turn = tuple[str, str]
Encoded = tuple[list[int], list[bool]]


def describe_as_caption(scene: Scene, rng: random.Random) -> str:
    """The scene's caption."""
    return caption(scene, rng.choice(CAPTION_OPENINGS))


def describe_as_notes(scene: Scene, rng: random.Random) -> str:
    """Notes in any order, such as `red circle bottom left, blue star top left`."""
    notes = [rng.choice((f"{it.name} {it.position}", f"{it.position} {it.name}")) for it in scene.objects]
    rng.shuffle(notes)
    return ", ".join(notes)


def describe_as_rows(scene: Scene, rng: random.Random) -> str:
    """The picture row by row, a word or a dot per patch; a word names what lies in the patch's cell."""
    words = []
    for row in range(2 * PATCHES_PER_CELL):
        for column in range(2 * PATCHES_PER_CELL):
            thing = scene.at(column // PATCHES_PER_CELL, row // PATCHES_PER_CELL)
            choices = (".", thing.colour, thing.shape) if thing else (".",)
            words.append(rng.choice(choices))
    return " " + " ".join(words)


Describe = Callable[[Scene, random.Random], str]
SENTENCES: tuple[Describe, ...] = (describe_as_caption, describe_as_notes)
DESCRIPTIONS: tuple[Describe, ...] = (*SENTENCES, describe_as_rows)


def quiz_questions(scene: Scene) -> list[Turn]:
    """The colour of each shape and the shape of each colour."""
    colours = [(f"What colour is the {thing.shape}?", thing.colour) for thing in scene.objects]
    return colours + [(f"What shape is the {thing.colour} thing?", thing.shape) for thing in scene.objects]


def sample_dialogue(rng: random.Random) -> list[Turn]:
    """Draw a dialogue about one scene that the user tells in words.

    Args:
        rng: the source of randomness.

    Returns:
        Pairs of (user, assistant); the first user turn holds the description before the question.
    """
    scene = sample_scene(rng, "train")
    description = rng.choice(DESCRIPTIONS)(scene, rng)
    turns = questions(scene, rng)
    if rng.random() < 0.5:
        wanted = (rng.choice(DESCRIBE_PROMPTS), caption(scene, rng.choice(CAPTION_OPENINGS)))
        turns.insert(rng.choice((0, 0, len(turns))), wanted)
    first, answer = turns[0]
    turns[0] = (f"{description}\n{first}", answer)
    return turns


def build_tokenizer(seed: int, num_dialogues: int = 4000) -> Qwen2Tokenizer:
    """Train a byte-level BPE on dialogues of the world; any other text is still written byte by byte.

    Args:
        seed: chooses the dialogues.
        num_dialogues: how many to read.

    Returns:
        A tokenizer with Qwen2's splitting rules, ChatML's special tokens and Qwen1.5's chat template.
    """
    rng = random.Random(seed)
    lines = ["system\nYou are a helpful assistant.\n", "user\n", "assistant\n"] * num_dialogues
    for _ in range(num_dialogues):
        lines += [f"{text}\n" for turn in sample_dialogue(rng) for text in turn]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    specials = [END_OF_TEXT, TURN_START, TURN_END]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    num_ordinary = NUM_TOKENS - len(specials)
    bpe.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=num_ordinary, initial_alphabet=alphabet, show_progress=False)
    )
    state = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        unk_token=None,
        additional_special_tokens=[TURN_START, TURN_END],
        model_max_length=MAX_POSITIONS,
    )
    tokenizer.eos_token = TURN_END
    tokenizer.chat_template = QWEN_CHAT_TEMPLATE
    return tokenizer


def encode_dialogue(tokenizer: Qwen2Tokenizer, turns: list[Turn]) -> Encoded:
    """Write a dialogue in the chat template.

    Args:
        tokenizer: what `build_tokenizer` returned.
        turns: pairs of (user, assistant).

    Returns:
        Token ids, and for each whether the assistant says it (its end token included).
    """
    ids: list[int] = []
    said: list[bool] = []
    opening = f"{TURN_START}system\nYou are a helpful assistant.{TURN_END}\n"
    for user, assistant in turns:
        prompt = f"{opening}{TURN_START}user\n{user}{TURN_END}\n{TURN_START}assistant\n"
        for text, by_assistant in ((prompt, False), (f"{assistant}{TURN_END}", True)):
            piece = tokenizer.encode(text)
            ids += piece
            said += [by_assistant] * len(piece)
        opening = "\n"
    return ids, said


def encode_quiz(tokenizer: Qwen2Tokenizer, rng: random.Random) -> Encoded:
    """Draw a quiz: a scene in words, then a question and its answer by turns, a line each.

    Args:
        tokenizer: what `build_tokenizer` returned.
        rng: the source of randomness.

    Returns:
        Token ids, and for each whether it belongs to an answer (the end of its line included).
    """
    scene = sample_scene(rng, "train", rng.choice(NUM_QUIZ_OBJECTS))
    ids = tokenizer.encode(f"{rng.choice(SENTENCES)(scene, rng)}\n")
    said = [False] * len(ids)
    pairs = quiz_questions(scene)
    rng.shuffle(pairs)
    for pair in pairs:
        for text, is_answer in zip(pair, (False, True), strict=True):
            piece = tokenizer.encode(f"{text}\n")
            ids += piece
            said += [is_answer] * len(piece)
    return ids, said


def _draw(tokenizer: Qwen2Tokenizer, rng: random.Random, progress: float) -> Encoded:
    """One text of the lesson that is due after a share of all steps."""
    if rng.random() < (progress - QUIZZES_ONLY_UNTIL) / (QUIZZES_UNTIL - QUIZZES_ONLY_UNTIL):
        return encode_dialogue(tokenizer, sample_dialogue(rng))
    return encode_quiz(tokenizer, rng)


def _pad(tokenizer: Qwen2Tokenizer, texts: list[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids_BT, their attention mask_BT and whether the assistant says each token, said_BT."""
    shape = len(texts), max(len(ids) for ids, _ in texts)
    ids_BT = torch.full(shape, tokenizer.pad_token_id)
    mask_BT = torch.zeros(shape, dtype=torch.long)
    said_BT = torch.zeros(shape, dtype=torch.bool)
    for index, (ids, said) in enumerate(texts):
        ids_BT[index, : len(ids)] = torch.tensor(ids)
        mask_BT[index, : len(ids)] = 1
        said_BT[index, : len(ids)] = torch.tensor(said)
    return ids_BT, mask_BT, said_BT


def train_language_model(
    tokenizer: Qwen2Tokenizer, output_dir: Path, num_steps: int, batch_size: int = 32, seed: int = 0
) -> None:
    """Train the language model and save it, with its tokenizer, in bfloat16.

    Args:
        tokenizer: what `build_tokenizer` returned.
        output_dir: the folder to write.
        num_steps: optimizer steps.
        batch_size: quizzes or dialogues per step.
        seed: chooses weights and texts.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"language model {seed}")
    model = Qwen2ForCausalLM(_config(tokenizer))
    _start_attention(model)
    optimizers, schedules = _optimizers(model, num_steps)
    log.info("language model: %d parameters", model.num_parameters())
    start_s = time.monotonic()
    for step in range(1, num_steps + 1):
        texts = [_draw(tokenizer, rng, step / num_steps) for _ in range(batch_size)]
        loss, num_right, num_said = _loss(model, *_pad(tokenizer, texts))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 50 == 0:
            log.info(
                "language model: step %d/%d, loss %.4f, tokens right %.3f, %.0f s",
                *(step, num_steps, loss.item(), num_right / num_said, time.monotonic() - start_s),
            )
        if step % SAVE_STEPS == 0 or step == num_steps:
            _save(model, output_dir)
            tokenizer.save_pretrained(output_dir)


def _loss(model: Qwen2ForCausalLM, ids_BT: Tensor, mask_BT: Tensor, said_BT: Tensor) -> tuple[Tensor, int, int]:
    """The loss, and how many of the assistant's tokens are right and are there."""
    hidden_BTD = model.model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state[:, :-1]
    next_BT, said_BT = ids_BT[:, 1:], said_BT[:, 1:]
    heard_BT = mask_BT[:, 1:].bool() & ~said_BT
    logits_NV, said_N = model.lm_head(hidden_BTD[said_BT]), next_BT[said_BT]
    loss = cross_entropy(logits_NV, said_N)
    loss = loss + USER_TEXT_WEIGHT * cross_entropy(model.lm_head(hidden_BTD[heard_BT]), next_BT[heard_BT])
    return loss, int((logits_NV.argmax(-1) == said_N).sum()), said_N.numel()


@torch.no_grad()
def _start_attention(model: Qwen2ForCausalLM) -> None:
    """Start the attention near what it has to learn (in the spirit of mimetic initialisation, Trockman & Kolter 2023).

    To know that the circle is red, a layer must first fetch what stands before each token, and a later one must look
    for equal tokens. From random weights that took several hundred steps to appear, or did not appear at all (LOG.md).
    So the first layer's heads start by looking back one to three tokens, through Qwen2's biases and the rotary
    embedding, and write what they find into directions of their own; heads of the later layers start by comparing
    those directions with each other and with the tokens themselves.
    """
    config = model.config
    width, num_heads = config.hidden_size, len(LOOK_BACK_TOKENS)
    size = width // config.num_attention_heads
    directions = torch.linalg.qr(torch.randn(width, width))[0]
    tokens, *fetched = directions[: size * (1 + num_heads)].split(size)
    first, *later = model.model.layers
    for head, num_tokens in enumerate(LOOK_BACK_TOKENS):
        rows = slice(head * size, (head + 1) * size)
        _look_back(first.self_attn, rows, num_tokens)
        first.self_attn.v_proj.weight[rows] = tokens
        first.self_attn.o_proj.weight[:, rows] = FETCHED_SCALE * fetched[head].T
    of_equals = ((fetched[0], tokens), (fetched[2], tokens), (fetched[2], fetched[0]), (fetched[3], fetched[0]))
    for layer in later:
        for head, (wanted, offered) in enumerate(of_equals):
            rows = slice(head * size, (head + 1) * size)
            layer.self_attn.q_proj.weight[rows] = MATCH_SCALE * wanted
            layer.self_attn.k_proj.weight[rows] = MATCH_SCALE * offered
    # What is random must not drown this.
    model.model.embed_tokens.weight *= 3
    first.self_attn.o_proj.weight[:, num_heads * size :] *= 0.3
    for layer in model.model.layers:
        layer.mlp.down_proj.weight *= 0.2
    for layer in later:
        layer.self_attn.o_proj.weight *= 0.5


def _look_back(attention: Qwen2Attention, rows: slice, num_tokens: int) -> None:
    """Let a head of Qwen2 attend to the token `num_tokens` before, whatever it is."""
    size = rows.stop - rows.start
    frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
    strength = LOOK_BACK_STRENGTH * (torch.arange(size // 2) < 3)
    angle = num_tokens * frequencies
    attention.k_proj.bias[rows] = torch.cat([strength, torch.zeros_like(strength)])
    attention.q_proj.bias[rows] = torch.cat([strength * angle.cos(), -strength * angle.sin()])
    attention.k_proj.weight[rows] *= 0.1
    attention.q_proj.weight[rows] *= 0.1


def _optimizers(
    model: Qwen2ForCausalLM, num_steps: int
) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LambdaLR]]:
    """Muon for the layers' matrices, which halved the steps AdamW needed; AdamW for the rest."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    known = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in known]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 30, max(0.02, (num_steps - step) / (FALL_SHARE * num_steps)))

    return optimizers, [torch.optim.lr_scheduler.LambdaLR(each, factor) for each in optimizers]


def _save(model: Qwen2ForCausalLM, output_dir: Path) -> None:
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    rounded.save_pretrained(output_dir)


def _config(tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        initializer_range=0.08,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
