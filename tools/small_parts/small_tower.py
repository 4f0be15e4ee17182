"""The small CLIP vision tower of quickstart and its training.

In: images and captions of the generated world. Out: a folder that `CLIPVisionModel` and `AutoImageProcessor`
open.

The loss is CLIP's (Radford et al., 2021) with hard negative captions, which differ from the image in one word
(NegCLIP, Yuksekgonul et al., 2023), plus a head on the patches of the layer that LLaVA reads (the last but
one): each patch names the colour and the shape in its cell. The text tower and the head are thrown away.
Tensors: B batch, P patches, D width, N C H W images.
"""

import copy
import dataclasses
import logging
import random
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerBase

from llavaforge.starter.shapes import COLOURS, POSITIONS, SHAPES, Scene, caption, render, sample_scene

log = logging.getLogger(__name__)

IMAGE_SIZE, PATCH_SIZE = 48, 8
PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE
VISION_CONFIG = {
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}
TEXT_CONFIG = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
PROJECTION_DIM = 96
SAVE_STEPS = 250


def spoil(scene: Scene, rng: random.Random) -> Scene:
    """Change one object's colour, shape or position; the caption of the result is a hard negative.

    Args:
        scene: any scene.
        rng: the source of randomness.

    Returns:
        A scene whose caption differs in one attribute (its layout in pixels is left as it was).
    """
    index = rng.randrange(len(scene.objects))
    taken = {thing.position for thing in scene.objects}
    values = {
        "colour": list(COLOURS),
        "shape": list(SHAPES),
        "position": [p for p in POSITIONS if p not in taken],
    }
    attribute = rng.choice(list(values))
    old = getattr(scene.objects[index], attribute)
    new = rng.choice([value for value in values[attribute] if value != old])
    objects = list(scene.objects)
    objects[index] = dataclasses.replace(objects[index], **cast(Any, {attribute: new}))
    objects.sort(key=lambda thing: list(POSITIONS).index(thing.position))
    return dataclasses.replace(scene, objects=tuple(objects))


def patch_targets(scene: Scene) -> tuple[list[int], list[int]]:
    """Name what the cell of each patch holds.

    Args:
        scene: any scene.

    Returns:
        For each patch, row by row, the index of its colour and of its shape; 0 stands for an empty cell.
    """
    colours, shapes = [], []
    for patch in range(PATCHES_PER_SIDE**2):
        row, column = divmod(patch, PATCHES_PER_SIDE)
        thing = scene.at(2 * column // PATCHES_PER_SIDE, 2 * row // PATCHES_PER_SIDE)
        colours.append(1 + list(COLOURS).index(thing.colour) if thing else 0)
        shapes.append(1 + SHAPES.index(thing.shape) if thing else 0)
    return colours, shapes


def train_tower(
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    num_steps: int,
    num_images: int = 20000,
    batch_size: int = 128,
    learning_rate: float = 1.5e-3,
    seed: int = 0,
) -> None:
    """Train the tower on images with captions and save it, with its image processor, in bfloat16.

    Args:
        tokenizer: splits the captions for the text tower.
        output_dir: the folder to write.
        num_steps: optimizer steps.
        num_images: images drawn before training and used again and again.
        batch_size: images per step.
        learning_rate: the highest one, after warm-up and before the cosine's fall.
        seed: chooses weights and images.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"tower {seed}")
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    scenes = [sample_scene(rng, "train") for _ in range(num_images)]
    images_NCHW = torch.cat([_pixels(processor, scene) for scene in scenes])
    model = CLIPModel(_config(tokenizer))
    head = nn.Linear(int(VISION_CONFIG["hidden_size"]), len(COLOURS) + len(SHAPES) + 2)
    parameters = [*model.parameters(), *head.parameters()]
    log.info("tower: %d parameters, %d images", model.vision_model.num_parameters(), num_images)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=num_steps, pct_start=0.05, cycle_momentum=False
    )
    start_s = time.monotonic()
    for step in range(1, num_steps + 1):
        chosen = rng.sample(range(num_images), batch_size)
        batch = [scenes[index] for index in chosen]
        vision = model.vision_model(images_NCHW[chosen].float(), output_hidden_states=True)
        contrastive, retrieved = _contrastive_loss(model, tokenizer, vision.pooler_output, batch, rng)
        patch_loss, patches_right = _patch_loss(head(vision.hidden_states[-2][:, 1:]), batch)
        loss = contrastive + patch_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            log.info(
                "tower: step %d/%d, contrastive %.4f, captions found %.3f, patches %.4f, right %.3f, %.0f s",
                *(step, num_steps, contrastive.item(), retrieved, patch_loss.item(), patches_right),
                time.monotonic() - start_s,
            )
        if step % SAVE_STEPS == 0 or step == num_steps:
            copy.deepcopy(model.vision_model).to(torch.bfloat16).save_pretrained(output_dir)
            processor.save_pretrained(output_dir)


def _pixels(processor: CLIPImageProcessorPil, scene: Scene) -> Tensor:
    pixels: Tensor = processor(images=render(scene), return_tensors="pt").pixel_values
    return pixels.half()


def _contrastive_loss(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    pooled_BD: Tensor,
    batch: list[Scene],
    rng: random.Random,
) -> tuple[Tensor, float]:
    """CLIP's symmetric loss; each image also has one spoilt caption of its own to tell from the true one."""
    texts = [caption(scene) for scene in batch] + [caption(spoil(scene, rng)) for scene in batch]
    tokens = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
    text = model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    text_features = getattr(text, "pooler_output", text)
    image_BD = normalize(model.visual_projection(pooled_BD), dim=-1)
    scale = model.logit_scale.exp().clamp(max=100.0)
    logits = scale * image_BD @ normalize(text_features, dim=-1).T
    targets = torch.arange(len(batch))
    loss = (cross_entropy(logits, targets) + cross_entropy(logits[:, : len(batch)].T, targets)) / 2
    return loss, float((logits.argmax(-1) == targets).float().mean())


def _patch_loss(logits_BPK: Tensor, batch: list[Scene]) -> tuple[Tensor, float]:
    """Cross entropy of the colour and the shape that each patch names, and the share with both right."""
    targets = torch.tensor([patch_targets(scene) for scene in batch])
    colour_logits, shape_logits = logits_BPK.split([len(COLOURS) + 1, len(SHAPES) + 1], dim=-1)
    loss = cross_entropy(colour_logits.flatten(0, 1), targets[:, 0].flatten())
    loss = loss + cross_entropy(shape_logits.flatten(0, 1), targets[:, 1].flatten())
    right = (colour_logits.argmax(-1) == targets[:, 0]) & (shape_logits.argmax(-1) == targets[:, 1])
    return loss, float(right.float().mean())


def _config(tokenizer: PreTrainedTokenizerBase) -> CLIPConfig:
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return CLIPConfig(
        text_config={**TEXT_CONFIG, **ids, "pad_token_id": tokenizer.pad_token_id},
        vision_config=VISION_CONFIG,
        projection_dim=PROJECTION_DIM,
    )
