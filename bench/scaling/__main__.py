"""`python -m bench.scaling`: run the benchmark."""

import sys

from bench.scaling.run import main

if __name__ == "__main__":
    sys.exit(main())
