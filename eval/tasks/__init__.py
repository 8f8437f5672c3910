"""The tasks: how to load their questions and grade their answers, the published figures, and the traps of these.

Data is a local file, a folder, or a Hub id. A new benchmark is a module with a loader, a grader and a `Task`, and an
entry in TASKS.
"""

from __future__ import annotations

from llm_jepa import UserError

from . import choices, files, gsm8k, nl_rx, nq_open, spider
from .questions import Data, Group, Task, last_text, nearest, turns_of

__all__ = ["TASKS", "Data", "Group", "Task", "last_text", "nearest", "task_named", "turns_of"]

TASKS = {
    task.name: task
    for task in (
        nl_rx.TASK,
        gsm8k.TASK,
        spider.TASK,
        nq_open.TASK,
        choices.HELLASWAG,
        choices.ROTTEN_TOMATOES,
        choices.PAWS,
        files.PARAREL,
        files.GROUPS,
    )
}


def task_named(name: str) -> Task:
    """The task of that name. Raises UserError, with the nearest name, if there is none."""
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}{nearest(name, TASKS)}")
    return TASKS[name]
