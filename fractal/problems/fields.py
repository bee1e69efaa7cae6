"""Fields of foreign problem files: read with the line, the field and what was expected in each error."""

import json
from typing import Any, NoReturn

from fractal.jsonl import Line


def text(line: Line, value: dict[str, Any], *names: str, default: str | None = None) -> str:
    """The first field of these names, with line ends as \n. Raises RecordError where none is a text or the default."""
    for name in names:
        if name in value:
            if not isinstance(value[name], str):
                raise line.error(f"field {name}: expected a string, got {type(value[name]).__name__}")
            return unix_lines(value[name])
    if default is None:
        raise line.error(f"field {' or '.join(names)} is missing")
    return default


def texts(line: Line, value: dict[str, Any], name: str) -> list[str]:
    """A list of strings, with line ends as \n; empty where the field is missing. Raises RecordError."""
    items = value.get(name, [])
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise line.error(f"field {name}: expected a list of strings")
    return [unix_lines(item).strip() for item in items]


def unix_lines(value: str) -> str:
    return value.replace("\r\n", "\n").replace("\r", "\n")


def task_id(line: Line, value: dict[str, Any], *names: str) -> str:
    """The first field of these names; the record's number in the file, from 0, where it has none of them."""
    for name in names:
        found = value.get(name)
        if type(found) is int or (isinstance(found, str) and found):
            return str(found)
        if found is not None:
            raise line.error(f"field {name}: expected a name or a number, got {type(found).__name__}")
    return str(line.number - 1)


def json_field(line: Line, value: dict[str, Any], name: str, default: Any = None) -> Any:
    """A field that holds JSON text, decoded as Python's json does; what is no text is taken as it stands."""
    found = value.get(name, default)
    if not isinstance(found, str):
        return found
    try:
        return json.loads(found) if found.strip() else default
    except (ValueError, RecursionError) as error:
        raise line.error(f"field {name}: not JSON text: {error}") from error


def seconds(line: Line, value: dict[str, Any], name: str) -> float | None:
    """A time limit: a number, "2.0 seconds", or {"seconds": 2, "nanos": 0}; None where there is none."""
    found = value.get(name)
    if found is None:
        return None
    try:
        if isinstance(found, dict):
            limit = float(found.get("seconds") or 0) + float(found.get("nanos") or 0) / 1e9
        else:
            limit = float(str(found).split()[0])
    except (ValueError, IndexError, TypeError):
        limit = -1.0
    if not 0 < limit < 3600:
        raise line.error(f"field {name}: expected seconds, got {found!r}")
    return limit


def refuse(line: Line, form: str, field: str, remedy: str) -> NoReturn:
    """A field decides the verdict and cannot be read."""
    raise line.error(f"{form}, field {field}: {remedy}", "")
