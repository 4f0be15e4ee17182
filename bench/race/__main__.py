"""`python -m bench.race`: run the benchmark."""

import sys

from bench.race.run import main

if __name__ == "__main__":
    sys.exit(main())
