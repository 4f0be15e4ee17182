"""What the fork server of `processes/workers.py` imports before it forks; nothing else imports this.

The collector is told to leave what is there alone: a collection in a worker would write to every object's header, and
each page written to becomes the worker's own.
"""

import gc

import pyarrow as pa

from llavaforge.data.index import prepare
from llavaforge.data.load import loader

PRELOADED = (loader, prepare)  # named, so that no tool takes their imports for unused

pa.array([0]).to_numpy()  # pyarrow imports pandas, where it is installed, at its first conversion: 50 MB a worker
gc.collect()
gc.freeze()
