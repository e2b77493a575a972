"""`python -m pipelines`: the `yan` command without installing it."""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main())
