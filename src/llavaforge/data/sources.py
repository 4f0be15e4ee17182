"""What a `data_path` is: which files hold the rows, which kind they are, and where the images are.

Comes in: an entry of a recipe's `data` list. Goes out: a `Source`. Called by `data/prepare.py`.

    data/LLaVA-CC3M-Pretrain-595K/         chat.json, images/ or images.zip
    rows.jsonl.zst                         one file: .json, .jsonl, .ndjson, also .gz and .zst
    my-set/                                data/train-00000-of-00004.parquet ..., or what `save_to_disk` wrote
    shards/                                000000.tar ... (WebDataset)
    liuhaotian/LLaVA-CC3M-Pretrain-595K    a data set of the hub, when there is no such folder
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llavaforge.config.schema import DataEntry
from llavaforge.data import columns
from llavaforge.data.image_store import ImageStore, find_image_root
from llavaforge.errors import UserError

_TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson")
_PACKED = (".gz", ".zst")
_SUFFIXES = (*_TEXT_SUFFIXES, *columns.SUFFIXES, ".tar")
_USUAL_NAMES = ("chat", "data", "train")


@dataclass(frozen=True)
class Source:
    """One data set on the disk.

    Attributes:
        entry: what the user asked for.
        name: of it in messages.
        files: hold the rows, in order.
        images: the images.
    """

    entry: DataEntry
    name: str
    files: tuple[Path, ...]
    images: ImageStore

    @property
    def file_names(self) -> list[str]:
        """What messages call the files: their names, with the folder where two share one."""
        names = [file.name for file in self.files]
        return names if len(set(names)) == len(names) else [str(file) for file in self.files]


def find_source(entry: DataEntry, cache_dir: Path) -> Source:
    """Find the files of a data set.

    Raises:
        UserError: nothing usable is there; says what was looked for.
    """
    path = entry.path.expanduser()
    if not path.exists():
        path = _from_hub(str(entry.path))
    files = _files(path, entry)
    folder = path if path.is_dir() else path.parent
    root = find_image_root(entry.images, folder)
    own = files if _kind(files[0]) not in _TEXT_SUFFIXES else ()
    return Source(entry, str(entry.path), tuple(files), ImageStore((root, *own), cache_dir / "archives"))


def _files(path: Path, entry: DataEntry) -> list[Path]:
    if path.is_file():
        if _kind(path) not in _SUFFIXES:
            raise UserError(f"{path}: not a known kind of data file. Known: {', '.join(_SUFFIXES)}, .gz and .zst.")
        if entry.split:
            raise UserError(f"{path}: a single file has no split {entry.split!r}. Drop `split`, or name the folder.")
        return [path]
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_files(path, entry.split)
    if entry.split and (path / entry.split).is_dir():
        return _files(path / entry.split, entry.model_copy(update={"split": None}))
    found = [file for file in sorted(path.iterdir()) if file.is_file() and _kind(file) in _SUFFIXES]
    found += sorted((path / "data").glob("*.parquet")) + sorted((path / "data").glob("*.tar"))
    for suffixes in (columns.SUFFIXES, (".tar",)):
        shards = [file for file in found if _kind(file) in suffixes and file.stem != "images"]
        if shards:
            return _of_split(path, shards, entry.split)
    return [_text_file(path, [file for file in found if _kind(file) in _TEXT_SUFFIXES], entry.split)]


def _text_file(path: Path, found: list[Path], split: str | None) -> Path:
    for name in (split,) if split else _USUAL_NAMES:
        named = [file for file in found if file.name.split(".")[0] == name]
        if named:
            return named[0]
    if len(found) == 1 and not split:
        return found[0]
    names = ", ".join(file.name for file in found[:10])
    if split:
        raise UserError(f"{path}: no split {split!r}. It holds: {names or 'no data files'}.")
    raise UserError(
        f"{path}: no chat.json in this folder"
        + (f", and several other data files ({names}): name one." if found else ". ")
        + "Name the data file itself, or take the layout of LLaVA-CC3M-Pretrain-595K: chat.json, images/."
    )


def _of_split(path: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    """Return the shards of a split: `train-00000-of-00004.parquet` is of the split train."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        match = re.match(r"^([A-Za-z][\w.]*?)(-\d+-of-\d+|[-_]?\d*)$", file.stem)
        splits.setdefault(match.group(1) if match else "", []).append(file)
    if split is None:
        named = [name for name in splits if name in ("train", "validation", "test", "val", "dev")]
        if not named:
            return list(files)
        split = "train" if "train" in named else named[0]
        if split != "train" and len(named) > 1:
            raise UserError(f"{path}: has the splits {', '.join(named)}: name one with `split`.")
    if split not in splits:
        raise UserError(f"{path}: no split {split!r}. It has: {', '.join(name or 'unnamed' for name in splits)}.")
    return splits[split]


def _saved_files(path: Path, split: str | None) -> list[Path]:
    """Return the files of a folder that `datasets.save_to_disk` wrote."""
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
            chosen = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else None)
            if chosen is None or chosen not in splits:
                raise UserError(f"{path}: has the splits {', '.join(splits)}: name one with `split`.")
            path = path / chosen
        elif split:
            raise UserError(f"{path}: has no splits, so not {split!r}. Drop `split`.")
        files = json.loads((path / "state.json").read_text())["_data_files"]
        return [path / file["filename"] for file in files]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what `save_to_disk` writes ({error}). Save it again.") from None


def _kind(path: Path) -> str:
    """Return a file's suffix, below .gz or .zst."""
    suffixes = path.suffixes
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in _PACKED else path.suffix


def _from_hub(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or _kind(Path(name)) in _SUFFIXES:
        raise UserError(f"{name}: no such file or folder (data_path).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no such file or folder (data_path), and the hub does not give it: {error}") from None
