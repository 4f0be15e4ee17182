"""From a YAML recipe and command-line flags to one validated config.

Comes in: a recipe path (or none) and overrides. Goes out: an instance of a class of `config/schema.py`. All problems
are `UserError`s that name the key and the nearest known one.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from yaml.error import MarkedYAMLError

from llavaforge.config.schema import DataEntry, Schema
from llavaforge.errors import UserError, reason

SchemaT = TypeVar("SchemaT", bound=Schema)

_MOST_BYTES, _MOST_VALUES = 1_000_000, 10_000  # of a recipe
_ALLOWED = ": Input should be "  # pydantic's words


def build(schema: type[SchemaT], values: Mapping[str, Any], where: str) -> SchemaT:
    """Validate `values` against `schema`.

    Args:
        schema: a class of `config/schema.py`.
        values: field names and raw values (strings are converted).
        where: what to call the source in messages, e.g. `recipe.yaml` or `command line`.

    Raises:
        UserError: one line per problem.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(dict(problem), schema) for problem in error.errors()]
        raise UserError(f"{where}: " + "\n".join(_merged(lines))) from None


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe.

    Raises:
        UserError: the file is absent, is not YAML, or is not a mapping of keys to values.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such recipe. Give a YAML file, such as one of recipes/, or only --flags.")
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path}: over {_MOST_BYTES:,} bytes, which is no recipe. Give a YAML file of options.")
    try:
        values = yaml.load(path.read_bytes(), _Loader)  # a safe loader: it makes plain values only
    except (yaml.YAMLError, UnicodeError) as error:
        raise UserError(f"{path}: not valid YAML in UTF-8: {error}") from None
    except (RecursionError, ValueError) as error:  # brackets too deep; a date or a number that does not exist
        raise UserError(f"{path}: not a recipe ({reason(error)}).") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: a recipe is a mapping `key: value` of named options, found {values!r:.100}.")
    return values


class _Loader(yaml.SafeLoader):
    """Plain YAML without what surprises: a key that comes twice, and aliases that grow without bound."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise MarkedYAMLError(problem=f"`{key.value}` stands twice; leave one", problem_mark=key.start_mark)
                seen.add(key.value)
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _num_values(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"its aliases make more than {_MOST_VALUES:,} values of it")
        return node


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node stands for, once its aliases are written out."""
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.YAMLError("an alias stands for what it is part of")
        return known[id(node)]
    known[id(node)] = 0
    children = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
    children = [] if isinstance(node, yaml.ScalarNode) else children
    known[id(node)] = 1 + sum(_num_values(child, known) for child in children)
    return known[id(node)]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean X?` for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean `{matches[0]}`?" if matches else ""


def _merged(lines: Iterable[str]) -> list[str]:
    """Make one line of what is said of an option that may be of one type or another."""
    merged: dict[str, list[str]] = {}
    for line in lines:
        about, divider, allowed = line.partition(_ALLOWED)
        merged.setdefault(about + divider, []).append(allowed.partition(", unable to")[0].rstrip("."))
    return [
        about + ", or ".join(dict.fromkeys(kinds)) + "." if about.endswith(_ALLOWED) else about
        for about, kinds in merged.items()
    ]


def _explain(problem: dict[str, Any], schema: type[Schema]) -> str:
    if problem["loc"][0:1] in (("data",), ("eval_data",)) and len(problem["loc"]) > 2:
        entry = {**problem, "loc": problem["loc"][2:]}
        return f"{problem['loc'][0]}, entry {problem['loc'][1] + 1}: {_explain(entry, DataEntry)}"
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key `{key}`.{nearest(key, schema.model_fields)}"
    if problem["type"] == "missing":
        return f"`{key}` is missing: give it in the recipe" + (f" or as --{key}." if schema is not DataEntry else ".")
    told = str(problem["msg"]).removeprefix("Value error, ") + "."
    return f"`{problem['loc'][0]}` = {problem['input']!r:.200}: {told}" if key else told
