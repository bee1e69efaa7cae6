"""Values of the command line's options: text to Python values, without pydantic.

Typer 0.29 lets pydantic do this, whose import alone takes a quarter of a second, the same again as everything else that
`fractal verify` does before its first program runs. Our options are texts, numbers, paths, choices and lists of texts.
"""

from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Values:
    """Takes the place of a parameter's pydantic adapter: typer calls `coerce`."""

    def __init__(self, annotation: Any) -> None:
        self._annotation = annotation

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        several = get_origin(self._annotation) is list
        if value is None:
            return () if several else None
        try:
            if several:
                (kind,) = get_args(self._annotation)
                return [convert(kind, item) for item in value]
            return convert(self._annotation, value)
        except ValueError as error:
            raise typer.BadParameter(str(error), ctx=ctx, param=param) from error


def convert(kind: Any, value: Any) -> Any:
    """A text of the command line or of the environment, or a default, as a value. Raises ValueError."""
    if isinstance(value, kind):
        return value
    if kind is int or kind is float:
        what = "an integer" if kind is int else "a number"
        try:
            return kind(value)
        except ValueError:
            raise ValueError(f"{value!r} is not {what}.") from None
    if kind is bool:
        word = str(value).lower()
        if word not in (*TRUE, *FALSE):
            raise ValueError(f"{value!r} is neither true nor false.")
        return word in TRUE
    if issubclass(kind, Enum):
        choices = {str(member.value): member for member in kind}
        if str(value) not in choices:
            raise ValueError(f"{str(value)!r} is not one of {', '.join(map(repr, choices))}.")
        return choices[str(value)]
    return kind(value)


class _Values:
    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, of which ours are read by `convert`, and those of other kinds by typer itself."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            descriptor = getattr(param, "type_descriptor", None)
            if descriptor is None or descriptor.is_ranged:
                continue
            annotation = descriptor.annotation
            kind = get_args(annotation)[0] if get_origin(annotation) is list else annotation
            if kind in (str, int, float, bool, Path) or (isinstance(kind, type) and issubclass(kind, Enum)):
                values = Values(annotation)
                param.get_runtime_param = lambda values=values: values
        return params


class Command(_Values, TyperCommand):
    """A command of ours: app.command(cls=Command)."""


class Group(_Values, TyperGroup):
    """The program with its commands: typer.Typer(cls=Group)."""
