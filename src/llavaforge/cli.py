"""The command line: one binary, a table of verbs, options read from `config/schema.py`.

Results go to stdout (the last line of most verbs is one JSON object), logs to stderr. Nothing heavy is imported before
a verb is chosen, so `llavaforge --help` stays quick.
"""

import argparse
import importlib
import logging
import os
import sys
import traceback
import typing
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavaforge.errors import (
    EndedElsewhere,
    RunFailed,
    StoppedEarly,
    UserError,
    as_user_error,
    is_out_of_memory,
    reason,
)
from llavaforge.files import to_json
from llavaforge.report.glyphs import visible
from llavaforge.training.signals import StopRequest
from llavaforge.version import __version__

if TYPE_CHECKING:
    from llavaforge.config.schema import Schema

logger = logging.getLogger(__name__)

_LIST = "a list of mappings"
_RECIPE_ONLY = {"stages": _LIST, "data": _LIST, "eval_data": _LIST, "variants": "a mapping of mappings"}
_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: "true|false"}


@dataclass(frozen=True)
class Verb:
    """One verb: the class with its options, the function that does it (within this package), and a line of help."""

    schema: str
    function: str
    summary: str
    takes_recipe: bool = False
    fails_on: str = ""  # the key of the result that is zero when all is well


VERBS: dict[str, Verb] = {
    "quickstart": Verb(
        "QuickstartConfig", "starter.quickstart:quickstart", "the whole story on tiny parts, on a CPU, with no network"
    ),
    "customize-model": Verb(
        "CustomizeModelConfig", "join.parts:customize_model", "join a vision tower and a language model"
    ),
    "data check": Verb(
        "DataCheckConfig", "data_check.check:data_check", "find what is wrong with a data set", True, "num_errors"
    ),
    "data preview": Verb(
        "DataPreviewConfig", "data_preview.preview:data_preview", "show samples as the model sees them", True
    ),
    "data make-shapes": Verb(
        "MakeShapesConfig", "starter.shapes:make_shapes", "write a generated data set of coloured shapes"
    ),
    "train": Verb(
        "TrainConfig",
        "training.run:train",
        "train the projector, a LoRA, the language model or all",
        takes_recipe=True,
    ),
    "compare": Verb(
        "CompareConfig", "comparison.compare:compare", "train in several ways and say what differs", takes_recipe=True
    ),
    "evaluate": Verb("EvaluateConfig", "inference.evaluate:evaluate", "held-out loss, and metrics of answers"),
    "chat": Verb("ChatConfig", "inference.chat:chat", "ask a model about an image"),
    "demo": Verb("DemoConfig", "inference.demo.serve:demo", "a page to ask a model, or two side by side, about images"),
    "export": Verb(
        "ExportConfig", "inference.export:export", "merge and verify a folder for plain transformers or llama.cpp"
    ),
    "env": Verb("EnvConfig", "machine.check:env", "show this machine, and prove that it trains", fails_on="num_failed"),
    "estimate": Verb(
        "EstimateConfig", "forecast.estimate:estimate", "memory, time and cost of a training, from configs alone", True
    ),
    "slurm": Verb("SlurmConfig", "sbatch:slurm", "write an sbatch script for a recipe"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0 done, 1 failed, 2 the user's input, 75 start me again, 130 by hand."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        name, rest = _choose(arguments)
        if name is None:
            return 0
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_Printable("%(message)s"))
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of torchvision, which is not needed
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # packs differ in length: else pieces of freed memory pile up
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        quiet_libraries()
        # From the first second on: imports take some.
        with StopRequest(is_last=argv is None) if name in ("train", "compare") else nullcontext():
            config = parse(name, rest)
            result = _load(VERBS[name].function)(config)
        if result is not None and os.environ.get("RANK", "0") == "0":  # several processes have one result
            _write(to_json(result))
        return 2 if result and result.get(VERBS[name].fails_on) else 0
    except UserError as error:
        return _refuse(error)
    except StoppedEarly as stop:
        sys.stderr.write(f"{stop}\n")
        return stop.exit_code
    except EndedElsewhere as end:
        return end.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except SystemExit as stop:  # argparse, after --help or a usage error
        return int(stop.code or 0)
    except Exception as error:
        theirs = as_user_error(error) if isinstance(error, OSError) else None
        if theirs is None and is_out_of_memory(error):
            theirs = RunFailed(f"out of memory ({reason(error)}). Take smaller batches or more memory.")
        if theirs is not None:
            return _refuse(theirs)
        traceback.print_exc()
        sys.stderr.write("This is a fault in llavaforge or a failed run, not in your input.\n")
        return 1


def quiet_libraries() -> None:
    """Let libraries say only what concerns a user."""
    for noisy in ("httpx", "httpx2", "matplotlib", "DeepSpeed", "gguf"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for warns in ("torchao", "torch.utils._pytree"):  # of kernels for other machines, when peft imports torchao
        logging.getLogger(warns).setLevel(logging.ERROR)


class _Printable(logging.Formatter):
    """Lets no control character of other people's texts through to a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _refuse(error: UserError) -> int:
    sys.stderr.write(f"error: {visible(str(error))}\n")
    return error.exit_code


def parse(name: str, arguments: Sequence[str]) -> "Schema":
    """Turn the arguments after a verb into its config.

    Flags override the recipe; `--train_type` and `--train-type` are the same.

    Raises:
        UserError: an unknown flag or key (with the nearest one), a missing field, a value of the wrong kind.
    """
    from llavaforge.config import load, recipe, schema

    verb = VERBS[name]
    options: type[Schema] = getattr(schema, verb.schema)
    parser = _parser(name, verb, options)
    given, unknown = parser.parse_known_args([_underscored(argument) for argument in arguments])
    if unknown:
        if (field := unknown[0][2:].split("=")[0]) in _RECIPE_ONLY.keys() & options.model_fields.keys():
            raise UserError(f"llavaforge {name}: `{field}` is {_RECIPE_ONLY[field]}, so it is given in a recipe only.")
        flags = [f"--{field}" for field in options.model_fields]
        raise UserError(f"llavaforge {name}: unknown argument `{unknown[0]}`.{load.nearest(unknown[0], flags)}")
    values = vars(given)
    path = values.pop("recipe", None) if verb.takes_recipe else None
    if path:
        read = load.read_recipe(Path(path))
        if options is schema.CompareConfig:
            recipe.check_own_model(read, values, str(path))
        values = recipe.override_all(read, values)
    if path and options is not schema.TrainConfig:  # a training recipe says more than these verbs need
        values = recipe.one_stage(values, values.get("stage"), str(path))
        foreign = schema.CompareConfig.model_fields.keys() - options.model_fields.keys()
        values = {key: value for key, value in values.items() if key not in foreign}
    return load.build(options, values, path or f"llavaforge {name}")


def call(name: str, values: Mapping[str, Any]) -> Any:
    """Do a verb from Python; the functions of `llavaforge` do no more than this.

    Args:
        name: of the verb.
        values: of all its options. One that equals its default counts as not given, as on the command line.

    Raises:
        UserError: a value of the wrong kind, options that contradict each other, or what the verb itself refuses.
    """
    from llavaforge.config import load, schema

    options: type[Schema] = getattr(schema, VERBS[name].schema)
    given = {}
    for field, info in options.model_fields.items():
        value, default = _as_in_a_recipe(values[field]), _as_in_a_recipe(info.get_default())
        if (type(value), value) != (type(default), default):  # types first: True == 1, and an array has no one answer
            given[field] = value
    return _load(VERBS[name].function)(load.build(options, given, name))


def _as_in_a_recipe(value: Any) -> Any:
    """Return a value as YAML would give it: paths as text, every sequence as a list."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _as_in_a_recipe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_in_a_recipe(item) for item in value]
    return value


def _choose(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the verb and the arguments after it; no verb when only help or the version was asked for."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _write(_overview())
        return None, []
    if arguments[0] == "--version":
        _write(f"llavaforge {__version__}")
        return None, []
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if name in VERBS:
            return name, arguments[length:]
    if arguments[0] == "data" and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        _write(_overview("data "))
        return None, []
    from llavaforge.config.load import nearest

    asked = " ".join(arguments[:2] if arguments[0] == "data" else arguments[:1])
    raise UserError(f"unknown verb `{asked}`.{nearest(asked, VERBS)} `llavaforge --help` lists them.")


def _overview(prefix: str = "") -> str:
    lines = [f"  {name:<18}{verb.summary}" for name, verb in VERBS.items() if name.startswith(prefix)]
    return "\n".join(
        ["usage: llavaforge VERB [options]     (llavaforge VERB --help lists a verb's options)", "", *lines]
    )


def _parser(name: str, verb: Verb, options: "type[Schema]") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"llavaforge {name}",
        usage=f"llavaforge {name} {'[RECIPE] ' if verb.takes_recipe else ''}[--option VALUE ...]",
        description=options.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    if verb.takes_recipe:
        lists = " and ".join(f"`{field}`" for field in sorted(_RECIPE_ONLY.keys() & options.model_fields.keys()))
        but = f", but for {lists}" if lists else ""
        parser.add_argument("recipe", nargs="?", help=f"a YAML recipe; flags override its keys{but}")
    for field, info in options.model_fields.items():
        if field in _RECIPE_ONLY:
            continue
        default = "" if info.is_required() or info.get_default() is None else f" (default: {info.get_default()})"
        text = f"{info.description or ''}{default}".replace("%", "%%")
        if field == "recipe":  # read, not merged with the flags
            parser.add_argument(field, help=text)
        elif info.annotation is bool or bool in typing.get_args(info.annotation):
            parser.add_argument(f"--{field}", nargs="?", const=True, metavar=_metavar(info.annotation), help=text)
        elif str(info.annotation).startswith("list"):
            parser.add_argument(f"--{field}", nargs="+", metavar="NAME", help=text)
        else:
            parser.add_argument(f"--{field}", metavar=_metavar(info.annotation), help=text)
    return parser


def _metavar(annotation: Any) -> str:
    """Return what a flag takes, for its help: `N`, `PATH`, `stop|skip`, `true|false|auto`."""
    annotation = getattr(annotation, "__origin__", annotation) if hasattr(annotation, "__metadata__") else annotation
    if annotation in _METAVARS:
        return _METAVARS[annotation]
    if typing.get_origin(annotation) is Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    return "|".join(_metavar(one) for one in reversed(typing.get_args(annotation)) if one is not type(None))


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _load(target: str) -> Any:
    module, function = target.split(":")
    return getattr(importlib.import_module(f"llavaforge.{module}"), function)


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
