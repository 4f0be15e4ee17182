"""The doctor: finds what is wrong with data before it is trained on. Every record, every image, all cores.

Comes in: the index of all data, and which of its rows are held out. Goes out: a `Diagnosis`.

Faults of records were found when the index was made (`data/index/prepare.py`). Here every image is decoded as training
decodes it, and records are compared: duplicates, images with several captions, held-out records that are trained on.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llavaforge.data.faults import KINDS, Fault, RecordError
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.order.mixture import image_keys
from llavaforge.data.pixels.decode import ImageError, decode
from llavaforge.data.storage.image_ref import ImageRef
from llavaforge.data.storage.image_store import ImageStore
from llavaforge.processes import workers
from llavaforge.progress import Bar

_IMAGES_PER_TASK = 32
_LEAST_RANGE = 16  # of 256 grey levels: a 12-bit scan in a 16-bit file has so few
_MOST_WARNINGS_KEPT = 1_000  # of each kind: a data set may have one per record

Numbers = npt.NDArray[np.int64]


class Finding(NamedTuple):
    """A fault and the data set it is in."""

    source: str
    contents: str
    fault: Fault


@dataclass
class Diagnosis:
    """What was found: all errors, which training would stop at, and the first warnings of each kind.

    `image_sizes` (num_images, 2) holds widths and heights of the different images; zeros where one cannot be read.
    """

    counts: Counter[str] = field(default_factory=Counter)
    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    image_sizes: Numbers = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))

    def add(self, finding: Finding) -> None:
        """Count a finding and keep it."""
        kind = finding.fault.kind
        self.counts[kind] += 1
        if KINDS[kind].severity == "error":
            self.errors.append(finding)
        elif self.counts[kind] <= _MOST_WARNINGS_KEPT:
            self.warnings.append(finding)

    def by_severity(self, severity: str) -> dict[str, int]:
        """Return the counts of one severity, in the order of `KINDS`."""
        return {
            kind: self.counts[kind] for kind, known in KINDS.items() if known.severity == severity and self.counts[kind]
        }


def examine(index: SampleIndex, held_out: npt.NDArray[np.bool_], decodes: bool, crops: bool = False) -> Diagnosis:
    """Examine data.

    Args:
        index: all of it, training and held-out.
        held_out: for each row, whether it is held out.
        decodes: decode every image.
        crops: the model's image processor crops images that are no squares.
    """
    found = Diagnosis()
    for data_set in index.data_sets:
        for fault in data_set.faults:
            found.add(Finding(data_set.source.name, data_set.contents, fault))
    starts, keys = image_keys(index)
    row_of_image = np.repeat(np.arange(len(index)), np.diff(starts))
    places = np.stack([row_of_image, np.arange(len(keys)) - starts[row_of_image]], axis=1)
    identities = _decode_all(index, keys, places, found) if decodes else keys
    _compare_texts(index, found)
    if crops:
        for number in np.flatnonzero(index.column("has_boxes") & (index.num_images > 0)).tolist():
            message = "a text holds a box, and the model's image processor crops images, so the box shifts."
            found.add(_finding(index, number, "cut_boxes", message))
    _compare_records(index, held_out, places, identities, found)
    return found


class _Seen(NamedTuple):
    """What decoding an image tells: its contents' digest, its size, or its fault."""

    digest: int
    width: int
    height: int
    fault: tuple[str, str] | None
    is_uniform: bool = False


def _see(stores: Sequence[ImageStore], images: list[tuple[int, ImageRef]]) -> list[_Seen]:
    """Read and decode images, each in the store of its data set."""
    found = []
    for data_set, ref in images:
        digest = 0
        try:
            data = stores[data_set].read(ref)
            digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
            image = decode(data, stores[data_set].name(ref))
            extrema: Any = image.getextrema()  # of each channel
            low, high = min(low for low, _ in extrema), max(high for _, high in extrema)
            uniform = min(image.size) == 1 or high - low < _LEAST_RANGE
            found.append(_Seen(digest, image.width, image.height, None, uniform))
        except (RecordError, ImageError) as error:
            found.append(_Seen(digest, 0, 0, (error.kind, str(error))))
    return found


def _decode_all(index: SampleIndex, keys: Numbers, places: Numbers, found: Diagnosis) -> Numbers:
    """Decode every different image once; return for each image of the index the digest of its contents."""
    _, first = np.unique(keys, return_index=True)
    first.sort()  # in the order of the files, which disks and row groups like
    # What cannot be read has no contents to compare: it is like nothing but itself.
    digest_of_key = np.arange(keys.max(initial=-1) + 1)
    found.image_sizes = np.zeros((len(first), 2), dtype=np.int64)
    faults: dict[int, tuple[str, str]] = {}
    message = "its pixels are all but equal, or in a single line: nothing can be seen in it."
    with Bar("decoding images") as bar:
        for number, seen in enumerate(_seen_in_order(index, places[first])):
            key = int(keys[first[number]])
            digest_of_key[key] = seen.digest or key
            found.image_sizes[number] = seen.width, seen.height
            if seen.fault is not None:
                faults[key] = seen.fault
            elif seen.is_uniform:
                faults[key] = ("nothing_to_see", message)
            share = (number + 1) / len(first)
            bar.update(share, f"decoding: {number + 1} images, {100 * share:.0f} %, ")
    for at in np.flatnonzero(np.isin(keys, list(faults))).tolist():
        row, place = places[at].tolist()
        found.add(_finding(index, row, *faults[int(keys[at])], index.row(row).images[place].name))
    return digest_of_key[keys]


def _seen_in_order(index: SampleIndex, places: Numbers) -> Iterator[_Seen]:
    def image(row: int, place: int) -> tuple[int, ImageRef]:
        found = index.row(row)
        return found.data_set, found.images[place]

    parts = (places[start : start + _IMAGES_PER_TASK].tolist() for start in range(0, len(places), _IMAGES_PER_TASK))
    tasks = ([image(*place) for place in part] for part in parts)
    for _, seen in workers.each(partial(_see, [one.source.images for one in index.data_sets]), tasks):
        yield from seen


def _compare_texts(index: SampleIndex, found: Diagnosis) -> None:
    """Find records that were shortened, and texts with a literal placeholder."""
    turns, tokens = index.column("num_turns_dropped"), index.column("num_tokens_cut")
    for number in np.flatnonzero(turns + tokens).tolist():
        cut = [f"{turns[number]} turns"] * bool(turns[number]) + [f"{tokens[number]} tokens"] * bool(tokens[number])
        message = f"{' and '.join(cut)} of it do not fit max_length."
        found.add(_finding(index, number, "shortened", message))
    special = index.column("num_special_tokens")
    for number in np.flatnonzero(special).tolist():
        message = f"its texts hold {special[number]} of the model's special tokens."
        found.add(_finding(index, number, "special_tokens", message))
    for number in np.flatnonzero(index.column("num_literals")).tolist():
        found.add(_finding(index, number, "literal_placeholder", "a text holds `<image>`, which is kept as text."))


def _compare_records(
    index: SampleIndex,
    held_out: npt.NDArray[np.bool_],
    places: Numbers,
    identities: Numbers,
    found: Diagnosis,
) -> None:
    """Find duplicates, images with several captions, and held-out records that are trained on."""
    digests = index.column("digest")
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    repeats = np.flatnonzero(first[group] != np.arange(len(digests)))
    for number in repeats.tolist():
        original = int(first[group[number]])
        if held_out[number] == held_out[original]:
            found.add(_finding(index, number, "duplicate", f"the same as {index.row(original).where}."))
    leaks: dict[int, str] = {}
    for what, keys, rows in (("the record", group, np.arange(len(index))), ("its image", identities, places[:, 0])):
        is_held_out = held_out[rows]
        held_keys, held_at = np.unique(keys[is_held_out], return_index=True)
        for at in np.flatnonzero(~is_held_out & np.isin(keys, held_keys)).tolist():
            twin = int(rows[is_held_out][held_at[np.searchsorted(held_keys, keys[at])]])
            message = f"trained on, but {what} is held out too, as {index.row(twin).where}."
            leaks.setdefault(int(rows[at]), message)
    for number, message in sorted(leaks.items()):
        found.add(_finding(index, number, "leak", message))
    for number, place, texts in _repeated_images(group, places, identities):
        image = index.row(number).images[place].name
        message = f"image {image[:100]!r} is also in {texts - 1} other record(s) with another text."
        found.add(_finding(index, number, "repeated_image", message, image))


def _repeated_images(group: Numbers, places: Numbers, identities: Numbers) -> Iterator[tuple[int, int, int]]:
    """Yield for each image that comes with several texts its first record, its place in there, and their number."""
    pairs = np.unique(np.stack([identities, group[places[:, 0]]], axis=1), axis=0)
    _, num_texts = np.unique(pairs[:, 0], return_counts=True)
    _, first = np.unique(identities, return_index=True)  # of the same images, in the same order
    several = np.flatnonzero(num_texts > 1)
    for number in several[np.argsort(first[several])]:
        row, place = places[first[number]].tolist()
        yield row, place, int(num_texts[number])


def _finding(index: SampleIndex, number: int, kind: str, message: str, path: str = "") -> Finding:
    row = index.row(number)
    data_set = index.data_sets[row.data_set]
    return Finding(data_set.source.name, data_set.contents, Fault(kind, row.file, row.number, row.id, message, path))
