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

from llavaforge.config.schema import DataEntry, Schema
from llavaforge.errors import UserError

SchemaT = TypeVar("SchemaT", bound=Schema)


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
        raise UserError(f"{where}: " + "\n".join(dict.fromkeys(lines))) from None


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe.

    Raises:
        UserError: the file is absent, is not YAML, or is not a mapping of keys to values.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such recipe. Give a YAML file, such as one of recipes/, or only --flags.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping `key: value`, found {type(values).__name__}.")
    return values


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean X?` for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean `{matches[0]}`?" if matches else ""


def _explain(problem: dict[str, Any], schema: type[Schema]) -> str:
    if problem["loc"][0:1] in (("data",), ("eval_data",)) and len(problem["loc"]) > 2:
        entry = {**problem, "loc": problem["loc"][2:]}
        return f"{problem['loc'][0]}, entry {problem['loc'][1] + 1}: {_explain(entry, DataEntry)}"
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key `{key}`.{nearest(key, schema.model_fields)}"
    if problem["type"] == "missing":
        return f"`{key}` is missing: give it in the recipe" + (f" or as --{key}." if schema is not DataEntry else ".")
    if not key:
        return str(problem["msg"]).removeprefix("Value error, ") + "."
    return f"`{problem['loc'][0]}` = {problem['input']!r}: {problem['msg']}."
