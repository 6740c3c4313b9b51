"""`python -m coreai_torch`: the environment report."""

import sys

from ._env_report import main

sys.exit(main())
