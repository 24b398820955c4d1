"""``python -m megatron_skyladder`` is the ``skyladder`` command."""

import sys

from megatron_skyladder.cli import main

sys.exit(main())
