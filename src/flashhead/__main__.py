"""`python -m flashhead`."""

import sys

from flashhead.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
