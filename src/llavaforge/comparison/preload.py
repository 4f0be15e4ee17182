"""What the fork server imports so that a run starts in a fraction of a second; nothing else imports this."""

from llavaforge.cli import quiet_libraries

quiet_libraries()

from llavaforge.inference import evaluate  # noqa: E402
from llavaforge.training import run  # noqa: E402

PRELOADED = (evaluate, run)  # named, so that no tool takes their imports for unused
