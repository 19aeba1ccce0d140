import sys

from zoext.cli import main

sys.exit(main())
