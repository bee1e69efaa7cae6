"""Which programs are the same: comments and layout do not count where a program cannot tell."""

import hashlib
import re

from fractal.sandbox.inside.protocol import KEY_BYTES

# Strings in single quotes and comments, scanned from the left as the compiler does; programs with longer strings, and
# with f-strings (which may hold quotes from Python 3.12 on), are taken as they stand.
_STRING_OR_COMMENT = re.compile(r"""'(?:[^\\'\n]|\\.)*'|"(?:[^\\"\n]|\\.)*"|#[^\n]*""")
_KEEP = re.compile(r"""\b(?:[fF][rR]?|[rR][fF])['"]|\\[ \t\f]*\n""")  # f-strings, and lines that go on
_BLANK = re.compile(r"[ \t\f]*\n(?:[ \t\f]*\n)*")


def normal_form(code: str) -> str:
    """A program without comments, blank lines and trailing blanks; as it stands where that could change a string.

    Only for programs that the sandbox found `fit`: others could tell the difference (line numbers).
    """
    code = code.replace("\r\n", "\n")
    if "\r" in code or "'''" in code or '"""' in code or _KEEP.search(code):
        return code.rstrip()
    bare = _STRING_OR_COMMENT.sub(lambda m: "" if m[0][0] == "#" else m[0], code) if "#" in code else code
    return _BLANK.sub("\n", bare).removeprefix("\n").rstrip()


def program_key(problem: bytes, code: str) -> bytes:
    """A program of a problem; two of one key have the same normal form."""
    text = normal_form(code).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(problem + text, digest_size=KEY_BYTES).digest()
