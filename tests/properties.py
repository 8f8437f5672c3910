"""How many examples a property gets: few in the default suite, and times as many in `tests.test_properties`."""

import os

from hypothesis import settings

TIMES = int(os.environ.get("LLM_JEPA_TEST_TIMES", "1"))


def examples(count: int) -> settings:
    """Decorate a property: `count` examples in the default suite. No test is about time."""
    return settings(max_examples=count * TIMES, deadline=None)
