"""`python -m flashhead.cli`."""

import sys

from flashhead.cli.main import main

sys.exit(main())
