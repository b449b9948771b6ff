"""`python -m numflash_tuner` is `numflash-tune`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
