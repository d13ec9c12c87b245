"""`python -m fxprune`: the same as the console command `fxprune`."""

import sys

from fxprune.cli.program import main

sys.exit(main())
