"""What identifies data, and an index made of it.

Comes in: a `Source` and a `SampleBuilder`. Goes out: hexadecimal digests.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from llavaforge.data.rows.kinds import FILE_KINDS, suffix_of
from llavaforge.data.rows.sources import Source
from llavaforge.data.storage import archives
from llavaforge.data.storage.image_store import ARCHIVES
from llavaforge.data.text.sample import SampleBuilder
from llavaforge.files import sha256


def fingerprint_of(source: Source, builder: SampleBuilder | None, format_: int) -> str:
    """Identify everything that an index depends on: `builder` is None for one without tokens, `format_` its own number.

    The contents of images are not part of it.
    """
    root = source.images.root
    parts: dict[str, Any] = {
        "format": [format_, source.entry.format, source.entry.max_samples],
        "files": source.file_names,  # of .jsonl lines are counted, of .json rows
        "data": contents_of(source),
        "archive": archives.fingerprint(root) if root.suffix in ARCHIVES else None,
    }
    if builder is not None:
        parts |= builder.identity()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def contents_of(source: Source) -> str:
    """Identify the contents of a data set's files."""
    cache_dir = source.images.cache_dir.parent / "contents"
    return hashlib.sha256("".join(_contents(path, cache_dir) for path in source.files).encode()).hexdigest()


def _contents(path: Path, cache_dir: Path) -> str:
    """Return the SHA-256 of a text file; of a file that holds images too, its size, time and both ends.

    The SHA-256 is remembered by size, times and inode, since a gigabyte takes a second or more.
    """
    if FILE_KINDS[suffix_of(path)].holds_images:
        return archives.fingerprint(path)
    status = path.stat()
    key = [str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    known = cache_dir / hashlib.sha256(json.dumps(key).encode()).hexdigest()
    if not known.is_file():
        digest = sha256(path)
        known.parent.mkdir(parents=True, exist_ok=True)
        temporary = known.with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(digest)
        os.replace(temporary, known)
        return digest
    return known.read_text()
