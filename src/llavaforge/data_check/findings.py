"""The doctor: finds what is wrong with data before it is trained on. Every record, every image, all cores.

Comes in: the index of all data, and which of its rows are held out. Goes out: a `Diagnosis`.

Faults of records were found when the index was made (`data/index/prepare.py`). Here every image is decoded as training
decodes it, and records are compared: duplicates, images with several captions, held-out records that are trained on.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
_MOST_WARNINGS_KEPT = 1_000  # of each kind: a data set may have one per record

Numbers = npt.NDArray[np.int64]


class Finding(NamedTuple):
    """A fault and the data set it is in."""

    source: str
    contents: str
    fault: Fault


@dataclass
class Diagnosis:
    """What was found.

    Attributes:
        counts: findings of each kind.
        errors: all findings that training would stop at.
        warnings: the first ones of each kind.
        image_sizes: (num_images, 2) widths and heights of the different images; zeros where one cannot be read.
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


def examine(index: SampleIndex, held_out: npt.NDArray[np.bool_], decodes: bool, quiet: bool = False) -> Diagnosis:
    """Examine data.

    Args:
        index: all of it, training and held-out.
        held_out: for each row, whether it is held out.
        decodes: decode every image.
        quiet: show no progress.
    """
    found = Diagnosis()
    for data_set in index.data_sets:
        for fault in data_set.faults:
            found.add(Finding(data_set.source.name, data_set.contents, fault))
    starts, keys = image_keys(index)
    row_of_image = np.repeat(np.arange(len(index)), np.diff(starts))
    identities = keys
    if decodes:
        identities = _decode_all(index, starts, keys, row_of_image, found, quiet)
    _compare_texts(index, found)
    _compare_records(index, held_out, starts, row_of_image, identities, found)
    return found


class _Seen(NamedTuple):
    """What decoding an image tells: its contents' digest, its size, or its fault."""

    digest: int
    width: int
    height: int
    fault: tuple[str, str] | None


class _Decoder:
    """Reads and decodes images; sent to each worker process once."""

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        self._stores = stores

    def __call__(self, images: list[tuple[int, ImageRef]]) -> list[_Seen]:
        return [self._see(self._stores[data_set], ref) for data_set, ref in images]

    def _see(self, store: ImageStore, ref: ImageRef) -> _Seen:
        digest = 0
        try:
            data = store.read(ref)
            digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
            image = decode(data, store.name(ref))
        except (RecordError, ImageError) as error:
            return _Seen(digest, 0, 0, (error.kind, str(error)))
        return _Seen(digest, image.width, image.height, None)


def _decode_all(
    index: SampleIndex, starts: Numbers, keys: Numbers, row_of_image: Numbers, found: Diagnosis, quiet: bool
) -> Numbers:
    """Decode every different image once; return for each image of the index the digest of its contents."""
    _, first = np.unique(keys, return_index=True)
    first.sort()  # in the order of the files, which disks and row groups like
    decoder = _Decoder([data_set.source.images for data_set in index.data_sets])
    digests = np.zeros(len(first), dtype=np.int64)
    sizes = np.zeros((len(first), 2), dtype=np.int64)
    faults: dict[int, tuple[str, str]] = {}
    done = 0
    with Bar("decoding images", quiet) as bar:
        for seen in _results(decoder, index, starts, row_of_image, first):
            # What cannot be read has no contents to compare: it is like nothing but itself.
            digests[done] = seen.digest or keys[first[done]]
            sizes[done] = seen.width, seen.height
            if seen.fault is not None:
                faults[int(keys[first[done]])] = seen.fault
            done += 1
            share = done / len(first)
            bar.update(share, f"decoding: {done} images, {100 * share:.0f} %, ")
    found.image_sizes = sizes
    if faults:
        for at in np.flatnonzero(np.isin(keys, list(faults))):
            row = index.row(int(row_of_image[at]))
            kind, message = faults[int(keys[at])]
            name = row.images[at - starts[row_of_image[at]]].name
            found.add(_finding(index, int(row_of_image[at]), kind, message, name))
    digest_of_key = np.zeros(int(keys.max()) + 1 if len(keys) else 0, dtype=np.int64)
    digest_of_key[keys[first]] = digests
    return digest_of_key[keys]


def _results(
    decoder: _Decoder, index: SampleIndex, starts: Numbers, row_of_image: Numbers, first: Numbers
) -> Iterator[_Seen]:
    def tasks() -> Iterator[list[tuple[int, ImageRef]]]:
        for start in range(0, len(first), _IMAGES_PER_TASK):
            task = []
            for at in first[start : start + _IMAGES_PER_TASK].tolist():
                row = index.row(int(row_of_image[at]))
                task.append((row.data_set, row.images[at - int(starts[row_of_image[at]])]))
            yield task

    for _, results in workers.each(decoder, tasks()):
        yield from results


def _compare_texts(index: SampleIndex, found: Diagnosis) -> None:
    """Find records that were shortened, and texts with a literal placeholder."""
    turns, tokens = index.column("num_turns_dropped"), index.column("num_tokens_cut")
    for number in np.flatnonzero(turns + tokens).tolist():
        cut = [f"{turns[number]} turns"] * bool(turns[number]) + [f"{tokens[number]} tokens"] * bool(tokens[number])
        message = f"{' and '.join(cut)} of it do not fit max_length."
        found.add(_finding(index, number, "shortened", message))
    for number in np.flatnonzero(index.column("num_literals")).tolist():
        found.add(_finding(index, number, "literal_placeholder", "a text holds `<image>`, which is kept as text."))


def _compare_records(
    index: SampleIndex,
    held_out: npt.NDArray[np.bool_],
    starts: Numbers,
    row_of_image: Numbers,
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
    numbers = np.arange(len(index))
    for what, keys, rows in (("the record", group, numbers), ("its image", identities, row_of_image)):
        is_held_out = held_out[rows]
        held_keys, held_at = np.unique(keys[is_held_out], return_index=True)
        for at in np.flatnonzero(~is_held_out & np.isin(keys, held_keys)).tolist():
            twin = int(rows[is_held_out][held_at[np.searchsorted(held_keys, keys[at])]])
            message = f"trained on, but {what} is held out too, as {index.row(twin).where}."
            leaks.setdefault(int(rows[at]), message)
    for number, message in sorted(leaks.items()):
        found.add(_finding(index, number, "leak", message))
    for number, at, others in _repeated_images(group, starts, row_of_image, identities):
        image = index.row(number).images[at].name
        message = f"image {image[:100]!r} is also in {others - 1} other record(s) with another text."
        found.add(_finding(index, number, "repeated_image", message, image))


def _repeated_images(
    group: Numbers, starts: Numbers, row_of_image: Numbers, identities: Numbers
) -> Iterable[tuple[int, int, int]]:
    """Yield for each image that comes with several texts its first record, its place in there, and their number."""
    pairs = np.unique(np.stack([identities, group[row_of_image]], axis=1), axis=0)
    images, counts = np.unique(pairs[:, 0], return_counts=True)
    several = dict(zip(images[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True))
    _, first = np.unique(identities, return_index=True)
    for at in np.sort(first[np.isin(identities[first], list(several))]).tolist():
        row = int(row_of_image[at])
        yield row, at - int(starts[row]), several[int(identities[at])]


def _finding(index: SampleIndex, number: int, kind: str, message: str, path: str = "") -> Finding:
    row = index.row(number)
    data_set = index.data_sets[row.data_set]
    return Finding(data_set.source.name, data_set.contents, Fault(kind, row.file, row.number, row.id, message, path))
