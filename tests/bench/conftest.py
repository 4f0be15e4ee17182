"""The benchmark is a package at the repository's root, not an installed one."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
