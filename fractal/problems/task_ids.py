"""Names of problems as people write them: `11`, `Mbpp/11`, `mbpp_11` and `011` are one problem."""

import re
from collections.abc import Iterable, Mapping

from fractal.errors import InputError

NAME = re.compile(r"(?:(?P<set>[A-Za-z](?:.*?[^/_\- ])?)[/_\- ])?0*(?P<number>[0-9]+)", re.DOTALL)


class TaskIds:
    """The names of a problem set, to find a problem by.

    >>> TaskIds(["HumanEval/0", "HumanEval/1"]).find("humaneval_1")
    'HumanEval/1'
    """

    def __init__(self, task_ids: Iterable[str]) -> None:
        self._known = dict.fromkeys(task_ids)
        self._by_number: dict[str, list[str]] | None = None  # made when a name is not a task_id as it stands

    def find(self, name: str) -> str | None:
        """The task_id of the problem that a file names, None for none. Raises InputError if it may be several."""
        if name in self._known:
            return name
        parts = NAME.fullmatch(name)
        if parts is None:
            return None
        if self._by_number is None:
            self._by_number = {}
            for task_id in self._known:
                if own := NAME.fullmatch(task_id):
                    self._by_number.setdefault(own["number"], []).append(task_id)
        found = [one for one in self._by_number.get(parts["number"], []) if _is_same_set(parts["set"], one)]
        if len(found) > 1:
            raise InputError(f"{name!r} may be problem {' or '.join(found)}. Write the whole name.")
        return found[0] if found else None


def known_id(name: str, problems: Mapping[str, object]) -> str | None:
    """`TaskIds.find` for one name."""
    return name if name in problems else TaskIds(problems).find(name)


def _is_same_set(name: str | None, task_id: str) -> bool:
    parts = NAME.fullmatch(task_id)
    own = parts["set"] if parts else None
    return name is None or own is None or name.casefold() == own.casefold()
