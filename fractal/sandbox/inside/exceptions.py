"""Exceptions of the standard library, and what of an exception crosses: class, arguments, attributes, cause, text.

A class crosses by its name in a closed list; the other end imports it from its own library. Classes of the program's
own are made anew, of nothing but their names and bases. Standard library only; used by judge and candidate.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any

from fractal.sandbox.inside.protocol import EXCEPTIONS

# By the module that the class says it is from. What is not installed is no class here.
STANDARD = {
    "argparse": "ArgumentError ArgumentTypeError",
    "asyncio.exceptions": "InvalidStateError IncompleteReadError LimitOverrunError BrokenBarrierError",
    "asyncio.queues": "QueueEmpty QueueFull",
    "binascii": "Error Incomplete",
    "calendar": "IllegalMonthError IllegalWeekdayError",
    "concurrent.futures._base": "Error CancelledError InvalidStateError BrokenExecutor",
    "configparser": "Error NoSectionError DuplicateSectionError DuplicateOptionError NoOptionError InterpolationError "
    "InterpolationDepthError InterpolationMissingOptionError InterpolationSyntaxError ParsingError "
    "MissingSectionHeaderError",
    "copy": "Error",
    "_csv": "Error",
    "ctypes": "ArgumentError",
    "dataclasses": "FrozenInstanceError",
    "decimal": "DecimalException InvalidOperation DivisionByZero Overflow Underflow Inexact Rounded Subnormal Clamped "
    "FloatOperation",
    "email.errors": "MessageError MessageParseError HeaderParseError BoundaryError MultipartConversionError",
    "getopt": "GetoptError",
    "graphlib": "CycleError",
    "gzip": "BadGzipFile",
    "http.client": "HTTPException InvalidURL IncompleteRead BadStatusLine",
    "inspect": "EndOfBlock",
    "ipaddress": "AddressValueError NetmaskValueError",
    "json.decoder": "JSONDecodeError",
    "locale": "Error",
    "_lzma": "LZMAError",
    "numpy": "AxisError",
    "numpy.exceptions": "AxisError DTypePromotionError TooHardError",
    "numpy.linalg": "LinAlgError",
    "pandas.errors": "EmptyDataError IntCastingNaNError MergeError OutOfBoundsDatetime ParserError InvalidIndexError",
    "_pickle": "PickleError PicklingError UnpicklingError",
    "pickle": "PickleError PicklingError UnpicklingError",
    "_queue": "Empty",
    "queue": "Empty Full",
    "re": "error",
    "shutil": "Error SameFileError SpecialFileError ExecError ReadError RegistryError",
    "socket": "gaierror herror",
    "sqlite3": "Error Warning InterfaceError DatabaseError DataError OperationalError IntegrityError InternalError "
    "ProgrammingError NotSupportedError",
    "statistics": "StatisticsError",
    "struct": "error",
    "subprocess": "SubprocessError CalledProcessError TimeoutExpired",
    "tarfile": "TarError ReadError CompressionError StreamError ExtractError HeaderError",
    "threading": "BrokenBarrierError",
    "tokenize": "TokenError",
    "tomllib": "TOMLDecodeError",
    "urllib.error": "URLError HTTPError ContentTooShortError",
    "xml.dom": "DOMException",
    "xml.etree.ElementTree": "ParseError",
    "xml.parsers.expat": "ExpatError",
    "zipfile": "BadZipFile LargeZipFile",
    "zlib": "error",
    "zoneinfo._common": "ZoneInfoNotFoundError",
}
NAMES = frozenset(f"{module}.{name}" for module, names in STANDARD.items() for name in names.split())
BUILT_IN_ATTRIBUTES = ("name", "filename", "filename2", "path", "value")  # those that are not arguments
CAUSES = 4  # exceptions in a chain of causes


def class_named(name: str) -> type[BaseException]:
    """A built-in exception class, or one of the closed list from its module. Raises KeyError."""
    if name in EXCEPTIONS:
        return EXCEPTIONS[name]
    if name not in NAMES:
        raise KeyError(name[:80])
    module, _, own = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), own, None)
    except Exception:  # not installed, or broken
        kind = None
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        raise KeyError(name)
    return kind


def name_of(kind: type) -> str | None:
    """The name by which a class crosses; None for one of the program's or the test's own."""
    name = kind.__name__
    if EXCEPTIONS.get(name) is kind:
        return name
    name = f"{kind.__module__}.{name}"
    known = name in NAMES and getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind
    return name if known else None


def nearest(kind: type) -> str:
    """The name of the nearest class that has one at both ends."""
    return next((name for c in kind.__mro__ if issubclass(c, Exception) and (name := name_of(c))), "Exception")


def own_classes(kind: type) -> list[type]:
    """The classes of one's own among an exception class and its bases, bases first."""
    return [c for c in reversed(kind.__mro__) if issubclass(c, Exception) and name_of(c) is None]


def attributes(error: BaseException) -> dict[str, Any]:
    """What an exception knows beside its arguments: its own attributes, and those that its own classes define."""
    kind = type(error)
    found: dict[str, Any] = {}
    more = isinstance(error, OSError | NameError | AttributeError | ImportError | StopIteration)
    if not more and not error.__dict__ and EXCEPTIONS.get(kind.__name__) is kind:
        return found
    for name in BUILT_IN_ATTRIBUTES:
        if getattr(kind, name, None) is not None and getattr(error, name, None) is not None:
            found[name] = getattr(error, name)
    for base in own_classes(kind):
        for name in vars(base):
            if name[:2] != "__":
                try:
                    found[name] = getattr(error, name)
                except Exception:
                    pass  # a property that raises
    return found | {name: value for name, value in error.__dict__.items() if type(name) is str}


def build(kind: type[BaseException], args: list[Any], known: dict[str, Any], hides: Callable[[type, str], bool]) -> Any:
    """An exception of a class with these arguments and attributes, made without the class's own code.

    A built-in class's own __init__ is called: it sets what the class keeps elsewhere. Attributes that would hide a
    method are left out. Raises whatever a built-in class says of wrong arguments.
    """
    near = nearest(kind)
    error = kind(*args) if near in EXCEPTIONS else kind.__new__(kind)
    error.args = tuple(args)
    for name, value in known.items():
        if name in BUILT_IN_ATTRIBUTES and hasattr(kind, name):
            setattr(error, name, value)
        elif not hides(kind, name):
            error.__dict__[name] = value
    return error
