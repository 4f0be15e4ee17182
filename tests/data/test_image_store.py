"""Images are read where they are, and nothing outside."""

import zipfile
from pathlib import Path

import pytest

from llavaforge.data.image_store import ImageStore, find_images
from llavaforge.errors import UserError


def picture_file() -> bytes:
    return b"not decoded here"


def test_a_zip_is_read_in_place_with_and_without_a_folder_inside(tmp_path: Path) -> None:
    data = picture_file()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.png", data)
        archive.writestr("images/b.png", data)
    store = find_images(tmp_path / "chat.json")
    assert store.has("a.png") and store.has("b.png") and not store.has("c.png")
    assert store.read("a.png") == store.read("b.png") == data
    assert not (tmp_path / "images").exists()


def test_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "images").mkdir()
    store = ImageStore(tmp_path / "images")
    assert not store.has("../secret.png") and not store.has(str(tmp_path / "secret.png"))
    with pytest.raises(UserError):
        store.read("../secret.png")
