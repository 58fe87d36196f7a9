"""``python -m void_ext.cli``."""

import sys

from void_ext.cli import main

sys.exit(main())
