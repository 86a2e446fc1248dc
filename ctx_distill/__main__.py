"""`python -m ctx_distill` is the same as `ctx-distill`."""

from __future__ import annotations

import sys

from ctx_distill.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
