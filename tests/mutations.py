"""Draws damaged files: cut, with a flipped byte, or with one value of their JSON replaced by an ill-typed one."""

import json
from typing import Any

from hypothesis import strategies as st

ILL_TYPED = st.sampled_from([None, True, 0, -1, 2**40, 1e308, "", "x", "\x00", [], {}, [1], {"a": 1}, "../../x"])


def draw_damaged(data: st.DataObject, whole: bytes, is_json: bool) -> bytes:
    """Return the damaged content of a file, which differs from `whole`."""
    kind = data.draw(st.sampled_from(["cut", "flip", "value", "value", "value"] if is_json else ["cut", "flip"]))
    if kind == "value":
        content = json.loads(whole)
        damaged = json.dumps(_put(content, data.draw(st.sampled_from(_places(content))), data.draw(ILL_TYPED)))
        return damaged.encode() if damaged != json.dumps(content) else b"{}"
    at = data.draw(st.integers(0, len(whole) - 1))
    if kind == "cut":
        return whole[:at]
    return whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in list(items)[:40] for place in _places(item, (*path, key)))]


def _put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    copied = value.copy()
    copied[place[0]] = _put(copied[place[0]], place[1:], new)
    return copied
