"""llavaforge: build and train your own LLaVA.

Every verb of the command line is also a function with the same field names:

    import llavaforge
    llavaforge.train(model_name_or_path="my-model/model-01", data_path="data", output_dir="run", train_type="projector")
    llavaforge.customize_model(vision_tower="clip", language_model="qwen")
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("_"):
        raise AttributeError(name)
    cli = import_module("llavaforge.cli")
    for verb in cli.VERBS:
        if name == verb.split()[-1].replace("-", "_"):
            return cli.function_of(verb)
    raise AttributeError(f"module `llavaforge` has no attribute `{name}`")
