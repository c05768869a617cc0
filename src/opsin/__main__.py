"""``python -m opsin``: the same as the ``opsin`` command."""

import sys

from opsin.cli.main import main

sys.exit(main())
