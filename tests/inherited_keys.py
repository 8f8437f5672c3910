"""Write the table of inherited keys anew, for other versions of transformers or TRL.

python -m tests.inherited_keys
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from llm_jepa.core.inherited import TABLE, table_of
from llm_jepa.core.recipe import recipe_fields
from llm_jepa.families import FAMILIES, groups_of, keys_of


def current_table() -> dict[str, Any]:
    """The table as the dataclasses have it."""
    inherited, described = {}, {}
    for name in FAMILIES:
        ours, groups = recipe_fields(keys_of(name)), groups_of(name)
        inherited[name] = {key: field for key, field in recipe_fields(groups).items() if key not in ours}
        described[name] = set(groups[-1].__annotations__)
    return table_of(inherited, described)


def as_text(table: dict[str, Any]) -> str:
    """The table as JSON with one key a line, so that a diff shows what a library changed."""
    parts = []
    for name, entries in table.items():
        lines = [f"{json.dumps(key)}: {json.dumps(entry, ensure_ascii=False)}" for key, entry in entries.items()]
        parts.append(f"{json.dumps(name)}: {{\n  " + ",\n  ".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m tests.inherited_keys", description=__doc__).parse_args()
    TABLE.write_text(as_text(current_table()))
    print(f"wrote {TABLE}")
