"""What the fork server imports so that a run starts in a fraction of a second; nothing else imports this.

Some of it is what others import only when they need it: a run of a few steps would spend a third of its time on that.
"""

import gc

from llavaforge.cli import quiet_libraries

quiet_libraries()

from matplotlib import figure  # noqa: E402
from matplotlib.backends import backend_agg  # noqa: E402
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402
from transformers.models.llava import modeling_llava, processing_llava  # noqa: E402

from llavaforge.inference import evaluate  # noqa: E402
from llavaforge.training import run  # noqa: E402

# Named, so that no tool takes their imports for unused.
PRELOADED = (figure, backend_agg, modeling_llava, processing_llava, evaluate, run)

get_checkpoint_conversion_mapping("llava")  # the first call makes a table, which takes 0.3 s
gc.collect()
gc.freeze()  # see data/load/preload.py
