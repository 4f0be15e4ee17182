"""The training run as a story; and, as `llavaforge.train(...)`, the verb itself.

Python binds a package's name in its parent when it is first imported, so `llavaforge.train` would be a function before
the first run and this package after it. A module may have a class of its own, so this one can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, **fields: Any) -> Any:
        """Do the verb; takes the options of `llavaforge train --help` as keywords."""
        from llavaforge.cli import call

        return call("train", fields)


sys.modules[__name__].__class__ = _CallablePackage
