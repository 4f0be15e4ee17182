"""`python -m bench.faults`: run the tests of the table and write the page."""

import sys

from bench.faults.run import main

if __name__ == "__main__":
    sys.exit(main())
