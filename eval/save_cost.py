"""`python -m eval.save_cost`: see `eval.cost.save_cost`."""

import sys

from .cost.save_cost import main

if __name__ == "__main__":
    sys.exit(main())
