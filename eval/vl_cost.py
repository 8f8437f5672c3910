"""`python -m eval.vl_cost`: see `eval.cost.vl_cost`."""

import sys

from .cost.vl_cost import main

if __name__ == "__main__":
    sys.exit(main())
