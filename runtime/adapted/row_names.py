"""What a call says of its rows: names of adapters, and numbers of tasks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.foreign.peft import BASE_ROWS, BY_ROW, TASK_IDS
from peftc.runtime.adapted.base_weights import Active
from peftc.runtime.adapted.together import as_active
from peftc.runtime.execution.virtual import no_task, task_numbers

Name = str | Sequence[str] | Mapping[str, float]
"""What a row has: an adapter, several in order, or several with weights."""


class Row(NamedTuple):
    """What a row of a call has: adapters with their weights, and its task where these have some."""

    active: Active
    task: int | None = None


def named(names: Any, known: Sequence[str]) -> tuple[Active, ...]:
    """What `adapter_names` gives each row; a tensor has numbers of the `known` names. Raises UsageError (E529)."""
    if isinstance(names, torch.Tensor):
        names = _by_number(names, known)
    if isinstance(names, str | Mapping) or not isinstance(names, Sequence):
        message = f"'{BY_ROW}' is a {type(names).__name__}"
        fail(UsageError, "E529", message, help=f"give a list with a name for each row, {BASE_ROWS!r} for none")
    return tuple(map(_active, names))


def rows_with(tasks: Any, count: int | None) -> int:
    """How many rows a call of `task_ids` alone has: as many as it has of whatever, or as there are tasks."""
    return count or (1 if tasks is None else len(task_numbers(tasks)))


def with_tasks(found: Sequence[Active], counts: Mapping[Active, int], tasks: Any) -> tuple[Row, ...]:
    """The rows with their tasks, of which adapters have so many (`counts`); one that is given is for all rows.

    What is given for a row whose adapters have none means nothing. Raises UsageError (E563).
    """
    if not any(counts.values()):
        if tasks is not None:
            no_task(0)
        return tuple(map(Row, found))
    if tasks is None:
        no_task(max(counts.values()))
    numbers: list[int] = task_numbers(tasks).tolist()
    if len(numbers) not in (1, len(found)):
        message = f"{len(numbers)} tasks were given for {len(found)} rows"
        fail(UsageError, "E563", message, help="give one for each row, or one for all", where=TASK_IDS)
    numbers = numbers * len(found) if len(numbers) == 1 else numbers
    for active, task in zip(found, numbers, strict=True):
        if counts[active] and not 0 <= task < counts[active]:
            names = " + ".join(name for name, _ in active)
            message = f"there is no task {task}: those of {names} are numbered from 0 to {counts[active] - 1}"
            fail(UsageError, "E563", message, where=TASK_IDS)
    return tuple(Row(each, task if counts[each] else None) for each, task in zip(found, numbers, strict=True))


def _by_number(ids: torch.Tensor, known: Sequence[str]) -> list[str]:
    numbers = ids.tolist() if ids.dim() == 1 and not ids.is_floating_point() else None
    if numbers is None or any(not -1 <= each < len(known) for each in numbers):
        message = f"'{BY_ROW}' is a tensor that has not the numbers of adapters, one for each row"
        help = f"give from 0 to {len(known) - 1} in the order of adding, -1 for none"
        fail(UsageError, "E529", message, help=help)
    return [known[each] if each >= 0 else BASE_ROWS for each in numbers]


def _active(name: Any) -> Active:
    """What a row is to have, as `set_adapter` reads it."""
    if isinstance(name, str):
        return () if name == BASE_ROWS else ((name, 1.0),)
    if isinstance(name, Mapping) or (isinstance(name, Sequence) and all(isinstance(each, str) for each in name)):
        return as_active(name)
    message = f"'{BY_ROW}' has {name!r} for a row"
    fail(UsageError, "E529", message, help="give a name, several in a tuple, or a dictionary of names and weights")
