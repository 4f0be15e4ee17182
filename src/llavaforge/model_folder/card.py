"""The card of a model folder or an adapter, its `README.md`: what the hub shows, and how plain libraries open it.

Comes in: a config, what the two parts are (`parts.json`), and the run that trained them. Goes out: Markdown.

    {"vision_tower": {"name": "openai/clip-vit-large-patch14-336", "revision": "ce19dc91...",
                      "license": null, "sha256": "8af1..."}, "language_model": {...}, "projector": {...}}
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from transformers import LlavaConfig
from yaml import YAMLError

from llavaforge.errors import UserError, reason
from llavaforge.folders import fingerprint
from llavaforge.model_folder.json_files import read_json

log = logging.getLogger(__name__)

PARTS = "parts.json"
RUN = "run.json"

# The hub's cache: .../models--openai--clip-vit-large-patch14-336/snapshots/ce19dc912ca5cd21c8a653c79e251e808ccabcd1
_SNAPSHOT = re.compile(r"/models--([\w.-]+)/snapshots/([0-9a-f]{40})$")

_OPENED = {
    "model": """\
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained(folder)
""",
    "adapter": """\
from peft import AutoPeftModel
from transformers import AutoProcessor

model = AutoPeftModel.from_pretrained(folder)  # opens the model of `base_model_name_or_path` below it
""",
}
_USE = """\
```python
{opened}processor = AutoProcessor.from_pretrained(folder)
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is in the image?"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=image, text=text, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

A single image comes before the words, as in training; the chat template puts it there.
"""
_GGUF_USE = """\
```
llama-server -m model.gguf --mmproj mmproj.gguf --jinja
llama-mtmd-cli -m model.gguf --mmproj mmproj.gguf --jinja --image photo.jpg -p "What is in the image?"
ollama create NAME -f Modelfile
```

The weights are {dtype}; `llama-quantize model.gguf smaller.gguf Q4_K_M` makes the language model smaller.

## What llama.cpp does otherwise

{points}

Ollama puts an image right before the words, without the newline of training: begin the words with one.
"""
_CLASS_TOKEN = (
    "Since May 2025 llama.cpp puts a CLIP's class token after the patches, but takes positions and patches as if it "
    "came first (its issue 25814): every patch gets its neighbour's position, and the first one is lost. Some answers "
    "differ for it until that is mended (its pull request 25844); the file is written for the right order."
)
_LETTERBOX = "An image that is no square gets grey-brown bars (122, 116, 104) at two sides and is seen whole; {ours}"
_GELU = "GELU is computed in its tanh form: embeddings differ in the third or fourth digit."
_NORMALIZER = "Text is not put into Unicode's NFC form: letters and their accents have to be typed as one character."

# Of a run's options, those that say what was learnt and how.
_SHOWN = (
    *("train_type", "prompt_style", "system_prompt", "max_length", "global_batch_size", "num_train_epochs"),
    *("learning_rate", "projector_learning_rate", "vision_learning_rate", "lr_scheduler_type", "warmup_ratio"),
    *("weight_decay", "optim", "lora_r", "lora_alpha", "lora_dropout", "seed"),
)


def describe_part(folder: Path) -> dict[str, Any]:
    """Return a part's name (of the hub's repository, or the folder's own), revision, licence and sum."""
    found = _SNAPSHOT.search(folder.resolve().as_posix())
    return {
        "name": found[1].replace("--", "/") if found else folder.resolve().name,
        "revision": found[2] if found else None,
        "license": _stated_license(folder / "README.md"),
        "sha256": fingerprint(folder),
    }


def read_records(folder: Path) -> dict[str, Any]:
    """Return what a model folder says of its parts and of the run that trained it, by the names of these files.

    Neither is needed to use the folder, so what cannot be read is left out with a warning.
    """
    found = {}
    for name in (PARTS, RUN):
        if (folder / name).is_file():
            try:
                found[name] = read_json(folder / name)
            except UserError as error:
                log.warning("not passed on to the new model's card: %s", error)
    return {name: content for name, content in found.items() if name == PARTS or "llavaforge" in content}


def _stated_license(card: Path) -> str | None:
    """Return what a part's own card says, None where it says nothing (or cannot be read: it is anybody's text)."""
    try:
        stated = (metadata_load(card) or {}).get("license") if card.is_file() else None
        return stated if isinstance(stated, str) else None
    except (OSError, ValueError, YAMLError) as error:
        log.warning("%s: the licence is not recorded, its front matter does not read: %s", card, reason(error))
        return None


def model_card(config: LlavaConfig, parts: Mapping[str, Any] | None, run: Mapping[str, Any] | None) -> str:
    """Return the text of a model folder's `README.md`.

    Args:
        config: of the model.
        parts: what `parts.json` holds; None where the model's parts are not known.
        run: what `run.json` holds; None for a model that was not trained.
    """
    vision = config.vision_config
    about = (
        f"A LLaVA made with llavaforge: a `{vision.model_type}` vision tower ({vision.image_size} pixels, patches of "
        f"{vision.patch_size}), a projector and a `{config.text_config.model_type}` language model, as transformers' "
        "own `LlavaForConditionalGeneration`.\n"
    )
    front = _front("transformers", parts, run)
    return "\n".join([front, about, _USE.format(opened=_OPENED["model"]), *_origins(parts), *_training(run)])


def adapter_card(base_model: str, parts: Mapping[str, Any] | None, run: Mapping[str, Any]) -> str:
    """Return the text of an adapter's `README.md`.

    Args:
        base_model: as `adapter_config.json` names it.
        parts: of the base model, as in `model_card`.
        run: what `run.json` holds, without private paths.
    """
    named = "/".join(part for part in Path(base_model).parts[-2:] if part != "..")
    about = (
        f"A LoRA for the language model of `{named}`, and its whole projector, made with llavaforge.\n"
        "`llavaforge export` merges it into a plain model.\n"
    )
    front = _front("peft", parts, run)
    return "\n".join([front, about, _USE.format(opened=_OPENED["adapter"]), *_origins(parts), *_training(run)])


def gguf_card(
    config: LlavaConfig,
    image_processor: Any,
    dtype: str,
    parts: Mapping[str, Any] | None,
    run: Mapping[str, Any] | None,
) -> str:
    """Return the text of the `README.md` of a folder for llama.cpp.

    Args:
        config: of the model.
        image_processor: of the model: whether it pads, crops or squeezes what is no square.
        dtype: of the matrices, for people.
        parts: as in `model_card`.
        run: as in `model_card`.
    """
    vision = config.vision_config
    about = (
        f"A LLaVA made with llavaforge, for llama.cpp: `model.gguf` is the `{config.text_config.model_type}` language "
        f"model, `mmproj.gguf` the `{vision.model_type}` vision tower ({vision.image_size} pixels) up to the layer "
        "that is read, and the projector.\n"
    )
    points = [_CLASS_TOKEN] if vision.model_type == "clip_vision_model" else []
    points += [_LETTERBOX.format(ours=_seen(image_processor)), _GELU, _NORMALIZER]
    use = _GGUF_USE.format(dtype=dtype, points="\n".join(f"* {point}" for point in points))
    front = _front("gguf", parts, run)
    return "\n".join([front, about, use, *_origins(parts), *_training(run)])


def _seen(image_processor: Any) -> str:
    """Say what training did with an image that is no square."""
    if getattr(image_processor, "do_pad", False):
        return "as in training, but for the bars' colour where the tower's mean is another."
    if getattr(image_processor, "do_center_crop", False):
        return "training saw its middle square. Cut it out yourself."
    return "training squeezed it into a square. Resize it to one yourself."


def _front(library: str, parts: Mapping[str, Any] | None, run: Mapping[str, Any] | None) -> str:
    """Return the YAML that the hub reads."""
    data = ModelCardData(
        library_name=library,
        pipeline_tag="image-text-to-text",
        base_model=_public(parts) or None,
        datasets=_public_data(run) or None,
        license=_license(parts),
        tags=["llava"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _public(parts: Mapping[str, Any] | None) -> list[str]:
    """Return the parts that are repositories of the hub: it checks `base_model`."""
    return [part["name"] for part in _entries(parts).values() if part.get("revision") and part.get("name")]


def _public_data(run: Mapping[str, Any] | None) -> list[str]:
    """Return the data sets that came from the hub, by their names there (older runs name none)."""
    named = (run or {}).get("hub_data")
    return sorted({name for name in named if isinstance(name, str)}) if isinstance(named, list) else []


def _license(parts: Mapping[str, Any] | None) -> str | None:
    """Return the licence that both parts have; what holds for two licences is for people to say."""
    found = {json.dumps(part.get("license")) for kind, part in _entries(parts).items() if kind != "projector"}
    license_ = json.loads(found.pop()) if len(found) == 1 else None
    return license_ if isinstance(license_, str) else None


def _entries(parts: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return what is said of each part, without what is no entry: the file may have been edited."""
    return {kind: part for kind, part in (parts or {}).items() if isinstance(part, dict)}


def _origins(parts: Mapping[str, Any] | None) -> list[str]:
    if not parts:
        return []
    rows = [
        [kind.replace("_", " "), part.get("name"), part.get("revision"), part.get("license"), part.get("sha256")]
        for kind, part in _entries(parts).items()
    ]
    return ["## Parts\n", _table(["part", "from", "revision", "license", "sha256 (weights, config, tokenizer)"], rows)]


def _training(run: Mapping[str, Any] | None) -> list[str]:
    if run is None:
        return []
    options, result = (part if isinstance(part := run.get(name), dict) else {} for name in ("config", "result"))
    lora = run.get("lora") is not None
    data = run.get("data")
    paths = [str(entry.get("path")) for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
    rows: list[Sequence[Any]] = [["data", ", ".join(paths)]]
    rows += [[name, options.get(name)] for name in _SHOWN if lora or not name.startswith("lora_")]
    rows += [["steps", result.get("global_step")]]
    rows += [[name, result.get(name)] for name in ("train_loss", "eval_loss")]
    tables = [_table(["", ""], [row for row in rows if row[1] not in (None, "")])]
    curve = run.get("curve")
    if isinstance(curve, list) and all(isinstance(point, dict) for point in curve):
        names = list(dict.fromkeys(name for point in curve for name in point))
        tables.append(_table(names, [[point.get(name) for name in names] for point in curve]))
    return ["## Training\n", *tables]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
