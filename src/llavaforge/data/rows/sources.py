"""What a `data_path` is: which files hold the rows, which kind they are, and where the images are.

Comes in: an entry of a recipe's `data` list. Goes out: a `Source`.

    data/LLaVA-CC3M-Pretrain-595K/         chat.json, images/ or images.zip
    rows.jsonl.zst                         one file: .json, .jsonl, .ndjson, also .gz and .zst
    my-set/                                data/train-00000-of-00004.parquet ..., or what `save_to_disk` wrote
    shards/                                000000.tar ... (WebDataset)
    liuhaotian/LLaVA-CC3M-Pretrain-595K    a data set of the hub, when there is no such folder
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llavaforge.config.schema import DataEntry
from llavaforge.data.rows.kinds import FILE_KINDS, PACKED, suffix_of
from llavaforge.data.storage import columns
from llavaforge.data.storage.image_store import ImageStore, close_files, find_image_root
from llavaforge.errors import UserError
from llavaforge.files import is_inside

_TEXTS = [suffix for suffix, kind in FILE_KINDS.items() if not kind.holds_images]
_KNOWN = f"{', '.join(FILE_KINDS)}; of {', '.join(_TEXTS)} also {' and '.join(PACKED)}"
_USUAL_SPLITS = ("train", "validation", "val", "valid", "dev", "test", "eval")
_NUMBERED = re.compile(r"-\d+-of-\d+")
_SHARD = re.compile(r"([A-Za-z][\w.-]*?|)(?:-\d+-of-\d+(?:-[0-9a-f]+)?|[-_.]?\d*)")  # (split) (number of the shard)
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

    @cached_property
    def file_names(self) -> list[str]:
        """What messages call the files: their names, with the folder where two share one."""
        names = [file.name for file in self.files]
        return names if len(set(names)) == len(names) else [str(file) for file in self.files]


def find_source(entry: DataEntry, cache_dir: Path) -> Source:
    """Find the files of a data set.

    Raises:
        UserError: nothing usable is there; says what was looked for.
    """
    close_files()  # of an earlier time, before they were changed
    path = entry.path.expanduser()
    if not path.exists():
        path = _from_hub(str(entry.path))
    if path.is_dir() and entry.split and (path / entry.split).is_dir() and not _is_saved(path):
        path, entry = path / entry.split, entry.model_copy(update={"split": None})
    files = _files(path, entry)
    for file in files:
        if not os.access(file, os.R_OK):
            raise UserError(f"{file}: not there, or not readable. Save or download {path} again.")
    root = find_image_root(entry.images, path if path.is_dir() else path.parent)
    roots = tuple(_real_folder(folder) for folder in entry.image_roots)
    column = columns.image_column_of(entry.columns)
    own = files if FILE_KINDS[suffix_of(files[0])].holds_images else ()
    return Source(entry, str(entry.path), tuple(files), ImageStore((root, *own), cache_dir / "archives", roots, column))


def _real_folder(folder: Path) -> str:
    if not folder.expanduser().is_dir():
        raise UserError(f"{folder}: no such folder (image_roots).")
    return os.path.realpath(folder.expanduser())


def _files(path: Path, entry: DataEntry) -> list[Path]:
    if path.is_file():
        if suffix_of(path) not in FILE_KINDS:
            hint = " Unpack it: it is read in place." if set(path.suffixes) & {".tgz", *PACKED} else ""
            raise UserError(f"{path}: not a known kind of data file.{hint} Known: {_KNOWN}.")
        if entry.split:
            raise UserError(f"{path}: a single file has no split {entry.split!r}. Drop `split`, or name the folder.")
        return [path]
    if _is_saved(path):
        return _saved_files(path, entry.split)
    found = [file for file in sorted(path.iterdir()) if _is_data(file)]
    texts = [file for file in found if suffix_of(file) in _TEXTS]
    found += [file for file in sorted((path / "data").glob("*")) if _is_data(file)]
    if entry.split or not any(file.name.split(".")[0] == "chat" for file in texts):
        for suffixes in (columns.SUFFIXES, (".tar",)):
            shards = [file for file in found if suffix_of(file) in suffixes and not _is_image_root(file, entry)]
            if suffixes == columns.SUFFIXES and all(file.with_suffix(".tar").is_file() for file in shards):
                continue  # what img2dataset leaves: the table beside a tar holds the addresses of its images
            if shards:
                return _of_split(path, shards, entry.split)
    if texts and all(_NUMBERED.search(file.name) for file in texts):
        return _of_split(path, texts, entry.split)
    return [_text_file(path, texts, entry.split)]


def _is_data(file: Path) -> bool:
    return file.is_file() and suffix_of(file) in FILE_KINDS and not file.name.startswith(".")


def _is_image_root(file: Path, entry: DataEntry) -> bool:
    return file.stem == "images" or (entry.images is not None and entry.images.exists() and file.samefile(entry.images))


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
        + (f", and several other data files ({names}): name one. " if found else ". ")
        + f"Name the data file itself ({_KNOWN}), or take the layout of LLaVA-CC3M-Pretrain-595K: chat.json, images/."
    )


def _of_split(path: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    """Return the shards of a split: `train-00000-of-00004.parquet` is of the split train."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(file)
    if split is None:
        if "train" in splits:
            return splits["train"]
        if len(splits) == 1 or not any(name in _USUAL_SPLITS for name in splits):
            return list(files)
    elif split in splits:
        return splits[split]
    names = ", ".join(name or "(no name)" for name in splits)
    raise UserError(
        f"{path}: has the splits {names}: name one with `split`."
        if split is None
        else f"{path}: no split {split!r}. It has: {names}."
    )


def _split_of(file: Path) -> str:
    """Return the split that a file's name tells: `train` of `vqarad_train.parquet`, else the name without a number."""
    stem = file.name.removesuffix(file.suffix).removesuffix(suffix_of(file))
    match = _SHARD.fullmatch(stem)
    name = match.group(1) if match else stem
    usual = [word for word in re.split(r"[-_.]", stem.lower()) if word in _USUAL_SPLITS]
    return usual[-1] if usual and name not in _USUAL_SPLITS else name


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _saved_files(path: Path, split: str | None) -> list[Path]:
    """Return the files of a folder that `datasets.save_to_disk` wrote."""
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
            chosen = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else None)
            if chosen is None or chosen not in splits:
                problem = "" if split is None else f"no split {split!r}: it "
                raise UserError(f"{path}: {problem}has the splits {', '.join(splits)}. Name one with `split`.")
            if not is_inside(chosen):
                raise ValueError("dataset_dict.json names a folder outside of it")
            path = path / chosen
        elif split:
            raise UserError(f"{path}: has no splits, so not {split!r}. Drop `split`.")
        files = json.loads((path / "state.json").read_bytes())["_data_files"]
        saved = [path / file["filename"] for file in files]
        if not all(is_inside(file["filename"]) for file in files):
            raise ValueError("state.json names a file outside of its folder")
        if others := [file.name for file in saved if file.suffix != ".arrow"]:
            raise ValueError(f"state.json names {others[0]}, which is no .arrow file")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not what `save_to_disk` writes ({error}). Save it again.") from None
    if not saved:
        raise UserError(f"{path}: a saved data set without rows.")
    return saved


def _from_hub(name: str) -> Path:
    is_local = Path(name).parent.exists() or suffix_of(Path(name)) in FILE_KINDS
    if is_local or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name}: no such file or folder (data_path).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no such file or folder (data_path), and the hub does not give it: {error}") from None
