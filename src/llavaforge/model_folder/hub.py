"""From the name of a model, a folder or a repository of the Hugging Face hub, to a folder."""

import re
from pathlib import Path

from llavaforge.errors import UserError

_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "README.md"]


def find_model_folder(name: str) -> Path:
    """Return the folder of that name, or a download of the hub's repository of that name.

    Raises:
        UserError: there is neither.
    """
    if (folder := _local(name)) is not None:
        return folder
    for weights in ("*.safetensors", "*.bin"):
        found = _downloaded(name, [*_SMALL_FILES, weights])
        if any(found.glob(weights)):
            return found
    raise UserError(f"{name}: the hub's repository holds neither *.safetensors nor *.bin.")


def find_config_folder(name: str) -> Path:
    """Return the same without weights: of the hub's repository only the small files are downloaded.

    Raises:
        UserError: as `find_model_folder`.
    """
    folder = _local(name)
    return _downloaded(name, _SMALL_FILES) if folder is None else folder


def _local(name: str) -> Path | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{name}: no such folder (and no name of a hub repository, such as Qwen/Qwen1.5-4B-Chat).")
    return None


def _downloaded(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:  # no network, no such repository, no access: all of them OSErrors
        raise UserError(f"{name}: no such folder, and the hub does not give it: {error}") from None
