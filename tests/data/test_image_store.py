"""Images are read where they are, from every kind of container, and nothing outside of it."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from llavaforge.data.faults import RecordError
from llavaforge.data.storage.image_ref import ImageRef
from llavaforge.data.storage.image_store import ImageStore, find_image_root
from llavaforge.errors import UserError

FILES = {"a.jpg": b"first" * 1000, "sub/b.jpg": b"second" * 1000}


def write_folder(root: Path) -> Path:
    for name, data in FILES.items():
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / name).write_bytes(data)
    return root / "images"


def write_zip(root: Path, prefix: str = "", compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(root / "images.zip", "w", compression) as archive:
        for name, data in FILES.items():
            archive.writestr(prefix + name, data)
    return root / "images.zip"


def write_tar(root: Path, prefix: str = "") -> Path:
    with tarfile.open(root / "images.tar", "w") as archive:
        for name, data in FILES.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return root / "images.tar"


def write_zip64(root: Path) -> Path:
    """As a zip over 4 GB or of over 65,535 members has it: zip64 fields, and a prefix before it all."""
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for name, data in FILES.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
        for number in range(70_000):
            archive.writestr(f"more/{number}", b"")
    (root / "images.zip").write_bytes(b"#!/bin/sh\n" + (root / "images.zip").read_bytes())
    return root / "images.zip"


WAYS: dict[str, Callable[[Path], Path]] = {
    "folder": write_folder,
    "zip": write_zip,
    "deflated zip": lambda root: write_zip(root, compression=zipfile.ZIP_DEFLATED),
    "zip with the folder inside": lambda root: write_zip(root, "images/"),
    "zip64": write_zip64,
    "tar": write_tar,
    "tar with ./": lambda root: write_tar(root, "./"),
    "tar with long names": lambda root: write_tar(root, "images/"),
}


def store(root: Path) -> ImageStore:
    return ImageStore((root,), root.parent / "cache")


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bytes_come_from_every_container(way: str, tmp_path: Path) -> None:
    root = WAYS[way](tmp_path)
    assert find_image_root(None, tmp_path) == root
    for images in (store(root), store(root)):  # the second one finds the directory of the archive in the cache
        for name, data in FILES.items():
            assert images.read(images.locate(ImageRef(name))) == data
            assert images.read(images.locate(ImageRef(f"./{name}"))) == data
        with pytest.raises(RecordError, match=r"'c\.jpg' is not in") as caught:
            images.locate(ImageRef("c.jpg"))
        assert caught.value.kind == "missing_image"


def test_a_changed_archive_is_read_anew(tmp_path: Path) -> None:
    root = write_zip(tmp_path)
    place = store(root).locate(ImageRef("sub/b.jpg"))
    with zipfile.ZipFile(root, "w") as archive:
        archive.writestr("0.jpg", b"x" * 777)
        archive.writestr("a.jpg", b"new")
    assert store(root).read(store(root).locate(ImageRef("a.jpg"))) == b"new"
    with pytest.raises(RecordError, match="cannot be read"):
        store(root).read(place)


def test_a_damaged_member_of_a_zip_is_noticed(tmp_path: Path) -> None:
    root = write_zip(tmp_path)
    place = store(root).locate(ImageRef("a.jpg"))
    data = bytearray(root.read_bytes())
    data[data.index(b"firstfirst") + 2000] ^= 1
    root.write_bytes(data)
    with pytest.raises(RecordError, match="damaged"):
        store(root).read(place)


@pytest.mark.parametrize("cut", [10, 300, 3000])
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_a_cut_off_archive_is_refused(write: Callable[[Path], Path], cut: int, tmp_path: Path) -> None:
    root = write(tmp_path)
    keep = 5500 if root.suffix == ".tar" else len(root.read_bytes()) - cut
    root.write_bytes(root.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a readable"):
        store(root).locate(ImageRef("a.jpg"))


OUTSIDE = [
    "../secret.jpg", "sub/../../secret.jpg", "/etc/hostname", "../images-evil/x.jpg", "..\\secret.jpg", "a\0.jpg",
    "C:/x",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("write", [write_folder, write_zip, write_tar])
def test_names_cannot_leave_the_root(write: Callable[[Path], Path], name: str, tmp_path: Path) -> None:
    root = write(tmp_path)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "images-evil").mkdir()
    (tmp_path / "images-evil" / "x.jpg").write_bytes(b"secret")
    with pytest.raises(RecordError, match="not a name below") as caught:
        store(root).locate(ImageRef(name))
    assert caught.value.kind == "unsafe_path"
    if root.is_dir():
        with pytest.raises(RecordError, match="not a name below"):
            store(root).read(ImageRef(name, 0))


def test_links_are_followed_inside_the_root_only(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    os.symlink(tmp_path / "secret.jpg", root / "out.jpg")
    os.symlink(tmp_path, root / "up")
    os.symlink(root / "a.jpg", root / "in.jpg")
    os.symlink(root, tmp_path / "linked-root")
    for name in ("out.jpg", "up/secret.jpg"):
        with pytest.raises(RecordError, match="a link out of its folder") as caught:
            store(root).locate(ImageRef(name))
        assert caught.value.kind == "unsafe_path"
        with pytest.raises(RecordError, match="a link out of its folder"):  # the link was made after the index
            store(root).read(ImageRef(name, 0))
    linked = store(tmp_path / "linked-root")
    assert linked.read(linked.locate(ImageRef("in.jpg"))) == FILES["a.jpg"]


def test_a_member_that_would_slip_out_of_an_unpacked_zip_is_not_reachable(tmp_path: Path) -> None:
    root = write_zip(tmp_path, prefix="../")
    for name in ("a.jpg", "../a.jpg", "images/a.jpg"):
        with pytest.raises(RecordError):
            store(root).locate(ImageRef(name))


def test_inline_images(tmp_path: Path) -> None:
    images = store(write_folder(tmp_path))
    ref = ImageRef("data:image/jpeg;base64,Zmlyc3Q=")
    assert images.read(images.locate(ref)) == b"first"
    with pytest.raises(RecordError, match="base64"):
        images.read(ImageRef("data:image/jpeg;base64,?"))


def test_a_root_that_cannot_be_read_in_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "images.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="Compressed tars cannot be read in place"):
        find_image_root(tmp_path / "images.tar.gz", tmp_path)
