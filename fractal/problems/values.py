"""Arguments and results of calls as the text that a Problem holds: the tagged JSON of the sandbox's protocol."""

import json
from typing import Any

from fractal.sandbox.inside.protocol import Decoder, Encoder, ProtocolError, Reference, Unencodable


def encode_value(value: Any) -> str:
    """Raises ValueError for what is no plain value.

    >>> encode_value([(1, 2), {3}])
    '[{"t":[1,2]},{"s":[3]}]'
    """
    try:
        return json.dumps(Encoder(_refuse_object).encode(value), separators=(",", ":"))
    except (Unencodable, RecursionError) as error:
        raise ValueError(str(error)) from error


def decode_value(text: str) -> Any:
    """The value of such a text. Raises ValueError."""
    try:
        return Decoder(_refuse_reference).decode(text.encode("utf-8", "surrogatepass"))
    except (ProtocolError, RecursionError) as error:
        raise ValueError(str(error)) from error


def is_arguments(text: str) -> bool:
    """Whether a text is the arguments of a call: a list of plain values."""
    try:
        return isinstance(decode_value(text), list)
    except ValueError:
        return False


def _refuse_object(value: Any) -> dict[str, Any]:
    raise Unencodable(f"a {type(value).__name__} is no plain value")


def _refuse_reference(reference: Reference) -> Any:
    raise ProtocolError("a reference to an object is no plain value")
