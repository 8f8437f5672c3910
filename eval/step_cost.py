"""`python -m eval.step_cost`: see `eval.cost.step_cost`."""

import sys

from .cost.step_cost.command import main

if __name__ == "__main__":
    sys.exit(main())
