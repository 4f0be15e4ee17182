"""Check a model folder by what plain transformers makes of it.

Comes in: a folder. Goes out: the loaded stock model, or a message that names the fault. Nothing here is trusted from
memory: files are read anew.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils.logging import disable_progress_bar

from llavaforge.errors import UserError, reading
from llavaforge.model_folder.read import read_config, read_processor
from llavaforge.model_folder.tensors import open_tensors


def read_checked(folder: Path) -> tuple[LlavaConfig, LlavaProcessor]:
    """Read a model folder's config and processor and check that they agree on `<image>`.

    Raises:
        UserError: one is missing or damaged, or they do not agree.
    """
    processor, config = read_processor(folder), read_config(folder)
    tokenizer, number = processor.tokenizer, config.image_token_index
    found = tokenizer.encode(processor.image_token, add_special_tokens=False)
    if found != [number]:
        raise UserError(
            f"{folder}: `{processor.image_token}` is {found} to the tokenizer and {number} to config.json; "
            "they must be one and the same token."
        )
    if number >= config.text_config.vocab_size:
        raise UserError(
            f"{folder}: `{processor.image_token}` has id {number}, but the embedding has only "
            f"{config.text_config.vocab_size} rows."
        )
    if processor.vision_feature_select_strategy != config.vision_feature_select_strategy:
        raise UserError(
            f"{folder}: vision_feature_select_strategy is {processor.vision_feature_select_strategy!r} in "
            f"processor_config.json and {config.vision_feature_select_strategy!r} in config.json."
        )
    return config, processor


def load_verified(
    folder: Path, dtype: torch.dtype | None = None, processor: LlavaProcessor | None = None
) -> LlavaForConditionalGeneration:
    """Load a model folder with plain transformers and check that it is whole.

    Args:
        folder: a model folder.
        dtype: type of the weights in memory; None takes the one that config.json names.
        processor: of `read_checked`, when it was called before.

    Returns:
        The stock model, in evaluation mode.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or the processor does not fit the model.
    """
    if processor is None:
        _, processor = read_checked(folder)
    disable_progress_bar()  # it takes longer to read than the weights take to load
    open_tensors(folder)  # names a damaged file, and a pickle that holds code, before transformers meets it
    with reading(folder, "It is the model that does not load. Copy or download the folder again."):
        model, report = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    check_report(folder, report)
    _check_image_tokens(folder, model.config, processor)
    return model.eval()


def check_report(folder: Path, report: dict[str, Any]) -> None:
    """Check the report of `from_pretrained(..., output_loading_info=True)`.

    Raises:
        UserError: some tensor did not land.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(str(key if isinstance(key, str) else key[0]) for key in report.get(kind) or ())
        if found:
            raise UserError(f"{folder}: {kind.replace('_', ' ')}: `{found[0]}` ({len(found)} in all).")


def num_placeholders(processor: LlavaProcessor) -> tuple[int, torch.Tensor]:
    """Process a small picture that is no square.

    Returns:
        The number of `<image>` tokens that one image takes, and its pixels (1, channels, height, width).
    """
    inputs = processor(images=Image.new("RGB", (48, 32)), text=processor.image_token, return_tensors="pt")
    found = (inputs["input_ids"] == processor.image_token_id).sum()
    return int(found), inputs["pixel_values"]


@torch.no_grad()
def compare_logits(expected: torch.Tensor, found: torch.Tensor, *, atol: float, what: str, hint: str = "") -> float:
    """Compare the logits of two models for the same inputs.

    Args:
        expected: (..., vocabulary); rows beyond those of `expected` are ignored in `found`.
        found: the same shape, or with a longer vocabulary.
        atol: largest difference that is taken.
        what: what is compared, for the message.
        hint: how to go on, for the message.

    Returns:
        The largest absolute difference.

    Raises:
        UserError: it exceeds `atol`, or is not a number.
    """
    found = found[..., : expected.shape[-1]]
    assert expected.shape == found.shape, f"{what}: {expected.shape} and {found.shape}"
    difference = float((expected.float() - found.float()).abs().max())
    if not difference <= atol:  # catches NaN as well
        raise UserError(f"{what}: logits differ by {difference:.3g} (at most {atol:.3g} is taken). {hint}".strip())
    return difference


@torch.no_grad()
def _check_image_tokens(folder: Path, config: LlavaConfig, processor: LlavaProcessor) -> None:
    placeholders, pixels_NCHW = num_placeholders(processor)
    with torch.device("meta"):  # shapes alone: a real tower takes half a minute for an image on a slow CPU
        model = LlavaForConditionalGeneration(config)
    try:
        features = model.get_image_features(pixels_NCHW.to("meta", model.dtype)).pooler_output[0]
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: the tower does not take the processor's images: {error}") from None
    if len(features) != placeholders:
        raise UserError(
            f"{folder}: the processor writes {placeholders} `<image>` tokens for an image, the tower yields "
            f"{len(features)}. Check patch_size, vision_feature_select_strategy and num_additional_image_tokens "
            "in processor_config.json."
        )
