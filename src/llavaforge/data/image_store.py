"""Image files where they are: a folder or a zip.

Comes in: a file name of a record. Goes out: its bytes. Called by `data/index.py` and loader workers.
"""

import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavaforge.errors import UserError


@dataclass
class ImageStore:
    """Images by name, in a folder or in a zip that is read in place.

    Each process opens its own handle of the zip, so a store may be sent to loader workers.
    """

    root: Path
    _archive: zipfile.ZipFile | None = field(default=None, init=False, repr=False)
    _names: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _owner: int = field(default=0, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_archive": None, "_names": {}, "_owner": 0}

    def has(self, name: str) -> bool:
        """Say whether there is a file of that name below the root."""
        if self._is_zip():
            return name in self._open()[1]
        return self._inside(name) and os.path.isfile(self.root / name)

    def read(self, name: str) -> bytes:
        """Return the bytes of an image file.

        Raises:
            UserError: no such file.
        """
        try:
            if self._is_zip():
                archive, names = self._open()
                return archive.read(names[name])
            if not self._inside(name):
                raise KeyError(name)
            return (self.root / name).read_bytes()
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.root / name}: cannot be read ({error}).") from None

    def _is_zip(self) -> bool:
        return self.root.suffix == ".zip"

    def _inside(self, name: str) -> bool:
        path = os.path.normpath(name)
        return not (os.path.isabs(path) or path.split(os.sep)[0] == os.pardir)

    def _open(self) -> tuple[zipfile.ZipFile, dict[str, str]]:
        # A handle that crossed a fork shares its file offset with the parent: open anew in each process.
        if self._archive is None or self._owner != os.getpid():
            try:
                self._archive = zipfile.ZipFile(self.root)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{self.root}: not a readable zip ({error}). Download or pack it again.") from None
            members = [name for name in self._archive.namelist() if not name.endswith("/")]
            # Zips made from outside the folder hold `images/a.jpg`, those made inside it `a.jpg`: both are `a.jpg`.
            self._names = {name.removeprefix("images/"): name for name in members} | {name: name for name in members}
            self._owner = os.getpid()
        return self._archive, self._names


def find_images(data_file: Path, image_folder: Path | None = None) -> ImageStore:
    """Return the store that belongs to a data file: `image_folder`, or `images/`, `images.zip`, the folder itself.

    Raises:
        UserError: `image_folder` is neither a folder nor a zip.
    """
    if image_folder is not None:
        if not image_folder.is_dir() and image_folder.suffix != ".zip":
            raise UserError(f"{image_folder}: no such folder (image_folder). Give a folder or a .zip of images.")
        return ImageStore(image_folder)
    for candidate in (data_file.parent / "images", data_file.parent / "images.zip"):
        if candidate.exists():
            return ImageStore(candidate)
    return ImageStore(data_file.parent)
