"""Publishes a folder twice over, as a save, a rotation and an overwrite do: the process that the sweep of kills starts.

`publish_once.py FOLDER CONTENT`: imports no torch, so that it starts in a tenth of a second.
"""

import shutil
import sys
from pathlib import Path

from llavaforge.files import replace_text
from llavaforge.folders import publishing

if __name__ == "__main__":
    folder, content = Path(sys.argv[1]), sys.argv[2]
    with publishing(folder / "model", overwrite=True) as temporary:
        for number in range(2):
            (temporary / f"part-{number}").write_text(content * 1000)
    with publishing(folder / f"checkpoint-{content}") as temporary:
        (temporary / "state").write_text(content)
    replace_text(folder / "latest", f"checkpoint-{content}")
    for old in sorted(folder.glob("checkpoint-*"))[:-2]:
        shutil.rmtree(old)
