"""`python -m scoreaction` is the command `scoreaction`."""

import sys

from scoreaction.cli import main

if __name__ == "__main__":
    sys.exit(main())
