"""What identifies data, and an index made of it.

Comes in: a `Source` and a `SampleBuilder`. Goes out: hexadecimal digests.
"""

import hashlib
import json
from typing import Any

from llavaforge.data.rows.kinds import FILE_KINDS, suffix_of
from llavaforge.data.rows.sources import Source
from llavaforge.data.storage import archives
from llavaforge.data.storage.image_store import ARCHIVES
from llavaforge.data.text.sample import SampleBuilder
from llavaforge.files import remembered_sha256


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
    if source.entry.columns:
        parts["columns"] = source.entry.columns
    if builder is not None:
        parts |= builder.identity()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def contents_of(source: Source) -> str:
    """Identify the contents of a data set's files: of text their SHA-256; of images too size, time and both ends."""
    cache = source.images.cache_dir.parent
    sums = (
        archives.fingerprint(path) if FILE_KINDS[suffix_of(path)].holds_images else remembered_sha256(path, cache)
        for path in source.files
    )
    return hashlib.sha256("".join(sums).encode()).hexdigest()
