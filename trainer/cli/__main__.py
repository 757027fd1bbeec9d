"""``python -m trainer.cli``: the same as ``afina``."""

import sys

from trainer.cli import main

sys.exit(main())
