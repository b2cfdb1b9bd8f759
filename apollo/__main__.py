"""`python -m apollo` is the same as the `apollo` command; see apollo/cli.py."""

import sys

from apollo.cli import main

sys.exit(main())
