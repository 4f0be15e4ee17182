"""`python -m llavaforge`, for launchers such as torchrun that start a module."""

import sys

from llavaforge.cli import main

sys.exit(main())
