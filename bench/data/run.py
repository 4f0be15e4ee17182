"""`make bench-data`: preparing records, opening them, reading images, and the doctor.

    python -m bench.data [--records 595375 3000000] [--photos FOLDER] [--output FILE]

Records are generated with the lengths of LLaVA-CC3M-Pretrain-595K (a caption has 10 words); each has an image file of
its own name (a hard link to one of a few real ones). Tokenizer: Qwen1.5's. A bar is the figure that it must reach.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from bench.data import images
from bench.machine import describe, source_sha256
from bench.report import print_machine
from llavaforge.config.schema import DataEntry, SampleOptions
from llavaforge.data.index.open import open_index
from llavaforge.data.pixels.decode import decode
from llavaforge.data.pixels.preprocessing import Preprocessing
from llavaforge.data.storage.image_ref import ImageRef
from llavaforge.data.storage.image_store import ImageStore
from llavaforge.data_check.findings import examine
from llavaforge.processes import workers

# Workers import the main module of the process that asks for them; `llavaforge train` has a light one too.
_CHILD = "from bench.data.records import main; main()"
_NUM_DOCTOR_IMAGES = 4_000
_PAIRS = 3
_NUM_GENERATED = 48  # images, where there are no photographs
_CHARS = "etaoinshrdlucmfwypvbgkqjxz"


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="*", default=[595_375, 3_000_000])
    parser.add_argument(
        "--photos", type=Path, default=Path("photos"), help="folder of JPEG files (default: photos; else noise)"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": describe(torch.float32), "source_sha256": source_sha256()}
    with tempfile.TemporaryDirectory(prefix="llavaforge-data-") as name:
        folder = Path(name)
        photos = gather_photos(options.photos, folder / "photos")
        results["photographs"] = options.photos.is_dir()
        results["images"] = images.measure(photos, repeats=5)
        results["zip_over_folder"] = zip_over_folder(photos, folder)
        results["doctor_over_bare_decoding"] = doctor_over_bare(photos, folder / "doctor")
        results["records"] = [measure_records(number, photos, folder) for number in options.records]
    show(results, Console(width=150))
    path = options.output or Path("bench/results") / f"{date.today()}-data.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {path}")


def gather_photos(source: Path, folder: Path) -> Path:
    """Copy the photographs, or draw noise where there are none: a folder of JPEG files on the disk of the work."""
    folder.mkdir(parents=True)
    if source.is_dir():
        for path in sorted(source.glob("*.jpg")):
            shutil.copyfile(path, folder / path.name)
        return folder
    rng = np.random.default_rng(0)
    for number in range(_NUM_GENERATED):
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.jpg", quality=90)
    return folder


def measure_records(number: int, photos: Path, folder: Path) -> dict[str, Any]:
    """Generate records and measure them in a process of its own."""
    data, cache = folder / f"records-{number}", folder / f"cache-{number}"
    print(f"generating {number:,} records ...", flush=True)
    write_records(number, photos, data)
    command = [sys.executable, "-c", _CHILD, str(data), str(cache)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    shutil.rmtree(data)
    shutil.rmtree(cache)
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def write_records(number: int, photos: Path, folder: Path) -> None:
    """Write a data set in the layout of LLaVA-CC3M-Pretrain-595K, a row at a time."""
    rng = random.Random(0)
    words = ["".join(rng.choices(_CHARS, range(len(_CHARS), 0, -1), k=rng.randint(2, 9))) for _ in range(8000)]
    files = sorted(photos.iterdir())
    (folder / "images").mkdir(parents=True)
    with (folder / "chat.json").open("w") as file:
        for row in range(number):
            name = f"GCC_train_{row:09d}"
            os.link(files[row % len(files)], folder / "images" / f"{name}.jpg")
            question = {"from": "human", "value": "Provide a brief description of the given image.\n<image>"}
            answer = {"from": "gpt", "value": " ".join(rng.choices(words, k=10)) + " ."}
            record = {"id": name, "image": f"{name}.jpg", "conversations": [question, answer]}
            file.write(("[" if row == 0 else ",\n") + json.dumps(record))
        file.write("]")


def zip_over_folder(photos: Path, folder: Path) -> dict[str, float]:
    """Race the whole way of an image, read, decoded, fitted to 336 px, from a zip against the folder."""
    archive = folder / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(photos.iterdir()):
            file.write(path, path.name)
    preprocessing = Preprocessing.of(images.CLIPImageProcessorPil(
        size={"shortest_edge": images.SIZE}, crop_size={"height": images.SIZE, "width": images.SIZE}
    ))  # fmt: skip
    stores = {name: ImageStore((root,), folder / "zip-cache") for name, root in (("folder", photos), ("zip", archive))}
    refs = {
        name: [store.locate(ImageRef(path.name)) for path in sorted(photos.iterdir())] for name, store in stores.items()
    }

    def seconds(name: str) -> float:
        begin = time.process_time()
        for ref in refs[name]:
            preprocessing(decode(stores[name].read(ref), "image"))
        return time.process_time() - begin

    return _ratio([(seconds("folder"), seconds("zip")) for _ in range(_PAIRS)])


class _BareDecoder:
    """Reads and decodes and nothing else; what the doctor is measured against."""

    def __call__(self, paths: list[Path]) -> int:
        for path in paths:
            with Image.open(path) as image:
                image.convert("RGB")
        return len(paths)


def doctor_over_bare(photos: Path, folder: Path) -> dict[str, float]:
    """Race the doctor's pass over the images against bare decoding in as many processes."""
    write_records(_NUM_DOCTOR_IMAGES, photos, folder)
    options = SampleOptions(cache_dir=folder / "cache")
    index = open_index([DataEntry(path=folder)], None, 0, options)
    paths = sorted((folder / "images").iterdir())
    held_out = np.zeros(len(index), dtype=bool)

    def bare() -> float:
        begin = time.perf_counter()
        assert sum(count for _, count in workers.each(_BareDecoder(), _tasks(paths))) == len(paths)
        return time.perf_counter() - begin

    def doctor() -> float:
        begin = time.perf_counter()
        found = examine(index, held_out, decodes=True)
        assert not found.errors and len(found.image_sizes) == len(paths)
        return time.perf_counter() - begin

    return _ratio([(bare(), doctor()) for _ in range(_PAIRS)]) | {"images": len(paths)}


def _tasks(paths: list[Path]) -> Iterator[list[Path]]:
    for start in range(0, len(paths), 32):
        yield paths[start : start + 32]


def _ratio(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Return how fast the second is, relative to the first (its time over ours)."""
    ratios = [first / second for first, second in pairs]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def show(results: dict[str, Any], console: Console) -> None:
    """Print all figures with their bars."""
    print_machine(results["machine"], console)
    table = Table(
        "records", "prepare s", "per million", "peak PSS MB", "open s", "access us", "worker USS MB", "index MB",
        title="Prepared once (bars for 595,375: 120 s, 2,000 MB, 1 s, 100 us, 50 MB)", title_justify="left",
    )  # fmt: skip
    for row in results["records"]:
        table.add_row(
            f"{row['records']:,}", f"{row['prepare_s']:.1f}", f"{row['prepare_s'] / row['records'] * 1e6:.0f}",
            f"{row['peak_pss_mb']:.0f}", f"{row['open_s']:.2f}", f"{row['random_access_us']:.1f}",
            f"{row['worker_uss_mb']['largest']:.1f}", f"{row['index_mb']:.0f}",
        )  # fmt: skip
    console.print(table)
    speed = results["images"]
    console.print(
        f"images: {speed['ours_images_per_s']} a second and core, transformers' Pillow processor "
        f"{speed['theirs_images_per_s']}: {speed['ratio']['median']}x ({speed['ratio']['lowest']}-"
        f"{speed['ratio']['highest']}; bar 1.25), {speed['images_with_unequal_pixels']} of {speed['images']} unequal"
    )
    for name, bar in (("zip_over_folder", 0.9), ("doctor_over_bare_decoding", 0.8)):
        row = results[name]
        console.print(f"{name}: {row['median']:.3f} ({row['lowest']:.3f}-{row['highest']:.3f}; bar {bar})")


if __name__ == "__main__":
    main()
