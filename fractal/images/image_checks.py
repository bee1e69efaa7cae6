"""Checks of the arguments of Image's methods; each raises ImageError with the call, what is wrong and what to write."""

import re
from collections.abc import Iterable
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from fractal.images.context import ImageError
from fractal.images.secret_patterns import PATTERNS, mask, occurs

DIGEST = "sha256:[0-9a-f]{64}"
BASE_NAME = re.compile(
    r"([A-Za-z0-9.\-]+(:\d+)?/)?[a-z0-9]+([._\-/]+[a-z0-9]+)*(?P<tag>:\w[\w.\-]{0,127})?(?P<digest>@" + DIGEST + ")?",
    re.ASCII,
)
DEBIAN_PACKAGE = r"[a-z0-9][a-z0-9+.\-]*(?<!-)(:[a-z0-9]+)?(=[\w.+~:\-]+)?"
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def describe(method: str, *arguments: Any, **options: Any) -> str:
    """A method call as written, for the beginning of an error; options that are empty are left out."""
    written = [*map(repr, arguments), *(f"{key}={value!r}" for key, value in options.items() if value)]
    return mask(f"{method}({', '.join(written)})")


def check_no_secret(call: str, text: str) -> None:
    data = text.encode(errors="replace")
    if any(pattern.anchor in data and occurs(pattern, data) for pattern in PATTERNS):
        raise ImageError(
            f"{call}: holds a password or a token, which anyone could read in the image. "
            "Give it to `docker run -e`; one for an index belongs into pip's configuration, which the build hears."
        )


def is_match(pattern: str, value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def check_names(call: str, names: Iterable[object], pattern: str, what: str) -> None:
    """Each name is a string of the pattern, and there is one at least."""
    listed = list(names)
    if not listed:
        raise ImageError(f"{call}: names nothing. Write at least one.")
    for name in listed:
        if isinstance(name, str) and name.startswith("-"):
            raise ImageError(f"{call}: {name} is an option. Options go into extra_options={name!r}.")
        if not is_match(pattern, name) or CONTROL.search(str(name)):
            several = isinstance(name, Iterable) and (not isinstance(name, str) or " " in name)
            hint = " Write the names one by one, each in quotes." if several else ""
            raise ImageError(f"{call}: {mask(repr(name))} is not {what}.{hint}")


def check_pinned(call: str, package: str) -> None:
    """NAME==VERSION, or NAME @ URL with a hash."""
    shown = mask(repr(package))
    try:
        requirement = Requirement(package)
    except InvalidRequirement as error:
        reason = mask(str(error).splitlines()[0]).rstrip(".")
        raise ImageError(f"{call}: {shown} is not a requirement: {reason}. Write NAME==VERSION.") from error
    if requirement.url:
        if not re.search(r"#.*sha256=[0-9a-f]{64}", requirement.url):
            raise ImageError(f"{call}: {shown} has no hash. Add #sha256=... to the address.")
        return
    pins = [spec for spec in requirement.specifier if spec.operator in ("==", "===") and spec.version[-2:] != ".*"]
    if len(pins) != 1 or len(requirement.specifier) != 1:
        raise ImageError(f"{call}: {shown} is not pinned. Write {requirement.name}==VERSION.")


def check_lock(call: str, text: str) -> None:
    """Every requirement of a lock file has a version and at least one hash."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ImageError(f"{call}: locks nothing. Lock anew: invoke lock.")
    for line in lines:
        name = line.split()[0]
        if name.startswith("-") or "==" not in name:
            raise ImageError(f"{call}: {mask(name)!r} is not NAME==VERSION. Lock anew: invoke lock.")
        check_pinned(call, re.split(r"\s--hash=", line)[0])
        if not re.search(r"\s--hash=sha256:[0-9a-f]{64}", line):
            raise ImageError(f"{call}: {name} has no hash. Lock anew: invoke lock.")


def check_command(call: str, command: object) -> None:
    """A shell command of one line that Docker hands to the shell as it is."""
    if not isinstance(command, str) or not command.strip() or command.lstrip().startswith("#"):
        raise ImageError(f"{call}: {command!r} is no command. Write a line for the shell.")
    if CONTROL.search(command) or command.rstrip().endswith("\\"):
        raise ImageError(f"{call}: a command is one line. Join lines with && or give them one by one.")
    if re.search(r"^\s*--|(^|\s)\d*<<-?[^<\s]", command):
        raise ImageError(
            f"{call}: Docker would take an option in front, or a here-document, for itself. Write the command first; "
            "for a document, add a file with add_local_file."
        )


def check_variable(name: object, value: object) -> None:
    """An environment variable without a secret; its value is never shown."""
    if not is_match(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ImageError(f"env: {name!r} is no variable's name. Write letters, digits and _.")
    if not isinstance(value, str) or CONTROL.search(value):
        raise ImageError(f"env: {name} has to be a text of one line. Write a string, without control characters.")


def absolute_path(call: str, path: str) -> str:
    """A path in the image that means the same in any instruction."""
    if not is_match(r"""(/+[^/"'\\$*?\[\]]+)+/*""", path) or not path.isprintable() or ".." in path.split("/"):
        raise ImageError(f"{call}: {path!r} is no path in the image. Write an absolute one below /, such as /app/NAME.")
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def one_line_options(call: str, options: str) -> str:
    """Options for apt-get or uv as one line."""
    if not isinstance(options, str) or CONTROL.search(options):
        raise ImageError(f"{call}: extra_options is one line of text. Write it as one string.")
    return options.strip()
