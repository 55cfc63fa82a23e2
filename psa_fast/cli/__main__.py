"""`python -m psa_fast.cli` is `psa-fast`."""

import sys

from psa_fast.cli import main

sys.exit(main())
