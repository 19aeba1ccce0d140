"""``python -m zoext`` and ``torchrun -m zoext`` are the command ``zoext``."""

import sys

from zoext.cli import main

sys.exit(main())
