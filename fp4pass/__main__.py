"""``python -m fp4pass``."""

import sys

from fp4pass.cli import main

if __name__ == "__main__":
    sys.exit(main())
