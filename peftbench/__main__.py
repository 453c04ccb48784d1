"""`python -m peftbench` is `peftbench`."""

import sys

from peftbench.cli.main import main

sys.exit(main())
