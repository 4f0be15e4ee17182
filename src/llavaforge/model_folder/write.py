"""The only writer of model folders: `customize-model`, a run's `final` and `export` all end here.

Comes in: a config, a processor and a stream of tensors; or an existing folder and what changed in it. Goes out: a
folder that transformers 4 and 5, vLLM and mlx open, published whole or not at all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlavaConfig, LlavaProcessor

from llavaforge.errors import UserError
from llavaforge.files import real_path, to_json
from llavaforge.folders import not_published, publishing
from llavaforge.model_folder.card import PARTS, RUN, model_card, read_records
from llavaforge.model_folder.config_files import config_json, generation_json, write_json
from llavaforge.model_folder.names import is_buffer, to_file_name, to_module_name
from llavaforge.model_folder.processor_files import write_processor
from llavaforge.model_folder.read import read_config, read_generation_config, read_processor
from llavaforge.model_folder.tensors import TensorFiles, open_tensors, write_shards

Change = Mapping[str, torch.Tensor] | Callable[[str, torch.Tensor], torch.Tensor]


def write_model_folder(
    output_dir: Path,
    *,
    config: LlavaConfig,
    processor: LlavaProcessor,
    generation_config: GenerationConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
    records: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder and publish it atomically.

    Args:
        output_dir: an absent or empty folder, or with `overwrite` a model folder to replace.
        config: `dtype` names the type that readers load by default.
        processor: image processor, tokenizer with `<image>`, and chat template.
        generation_config: eos, pad and `suppress_tokens` are completed.
        tensors: file names (`to_file_name`) and tensors; read once, one shard in memory at most.
        overwrite: replace an existing model folder, once the new one is complete.
        check: called with the complete folder before it is published; what it raises stops the publishing.
        records: JSON files by name, `PARTS` and `RUN`: what the model is made of, and what trained it.

    Raises:
        UserError: `output_dir` is not empty and `overwrite` was not given, or holds something else than a model.
    """
    check_output_dir(output_dir, overwrite)
    with publishing(output_dir, overwrite=overwrite) as folder:
        write_json(folder / "config.json", config_json(config))
        write_json(folder / "generation_config.json", generation_json(config, generation_config, processor))
        write_shards(folder, "model", tensors)
        write_processor(folder, processor)
        records = records or {}
        for name, content in records.items():
            (folder / name).write_text(to_json(content, indent=1) + "\n", encoding="utf-8")
        card = model_card(config, records.get(PARTS), records.get(RUN))
        (folder / "README.md").write_text(card, encoding="utf-8")
        if check is not None:
            check(folder)


def update_model_folder(
    output_dir: Path,
    base: Path,
    changed: Change,
    overwrite: bool = False,
    records: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that equals `base` but for some tensors.

    Args:
        output_dir: as in `write_model_folder`.
        base: a model folder of ours or of llava-hf's; names and files are normalised on the way.
        changed: new tensors by in-memory name, or a function `(in-memory name, base tensor) -> tensor`, which returns
            its argument for what stays. New tensors are cast to the base's type; the others keep their bytes.
        overwrite: as in `write_model_folder`.
        records: as in `write_model_folder`; what the base says is passed on, where they say nothing.

    Raises:
        UserError: `base` is no complete model folder, or `output_dir` cannot be written.
        ValueError: `changed` names a tensor that `base` lacks, or has another shape.
    """
    files = open_tensors(base)
    modules = {to_module_name(name): name for name in files if not is_buffer(name)}
    if isinstance(changed, Mapping):
        unknown = sorted(set(changed) - set(modules))
        if unknown:
            raise ValueError(f"{base} has no tensor `{unknown[0]}` ({len(unknown)} such names)")
    write_model_folder(
        output_dir,
        config=read_config(base),
        processor=read_processor(base),
        generation_config=read_generation_config(base),
        tensors=_updated(files, modules, changed),
        overwrite=overwrite,
        records=read_records(base) | dict(records or {}),
    )


def check_output_dir(output_dir: Path, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Check, before any work is done, that `output_dir` may be written.

    Args:
        output_dir: where a model folder is to be written.
        overwrite: whether a model folder there may be replaced.
        sources: folders that are read; none of them may be inside `output_dir`, nor it in one of them.

    Raises:
        UserError: it may not.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir}: is a file. Give another --output_dir.")
    for source in sources:
        if real_path(source).is_relative_to(real_path(output_dir)):
            raise UserError(f"{output_dir}: writing there would replace {source}, which is read. Give another folder.")
        if real_path(output_dir).is_relative_to(real_path(source)):
            raise UserError(f"{output_dir}: lies inside {source}, which is read. Give a folder outside of it.")
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output_dir}: is not empty. Give another --output_dir, or --overwrite to replace it.")
    if not any((output_dir / name).is_file() for name in ("config.json", "model.gguf")):
        raise UserError(
            f"{output_dir}: --overwrite replaces a model folder only, and this has no config.json (nor a model.gguf)."
        )
    if strangers := not_published(output_dir):
        raise UserError(
            f"{output_dir}: --overwrite replaces only what llavaforge wrote, and this has {', '.join(strangers[:3])}"
            f"{', ...' * (len(strangers) > 3)}. Move that away, or give another --output_dir."
        )


def _updated(files: TensorFiles, modules: Mapping[str, str], changed: Change) -> Iterator[tuple[str, torch.Tensor]]:
    for module_name, stored_name in modules.items():
        tensor = files[stored_name]
        if isinstance(changed, Mapping):
            new = changed.get(module_name, tensor)
        else:
            new = changed(module_name, tensor)
        if new.shape != tensor.shape:
            raise ValueError(f"`{module_name}`: {tuple(new.shape)} instead of {tuple(tensor.shape)}")
        yield to_file_name(module_name), new.detach().to("cpu", tensor.dtype)
