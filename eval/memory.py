"""`python -m eval.memory`: see `eval.cost.memory`."""

import sys

from .cost.memory import main

if __name__ == "__main__":
    sys.exit(main())
