"""Secrets by the form that their issuers document: what neither an image's definition nor its layers may hold. Pure.

search([b"key = ghp_...", ...], PATTERNS)     # -> the patterns that occur, also across the borders of pieces
"""

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

Kind = Literal[
    "private key",
    "token",
    "password",  # in an address
    "machine",  # a certificate, address or path of the machine that built
    "private file",  # by its name: .netrc, pip.conf, credentials
    "weights",
    "cache",
    "setuid",
    "root",  # the image's program runs as root
]
OVERLAP = 4096  # bytes; no secret is longer, or its first so many bytes are proof


class Pattern(NamedTuple):
    """What is searched for: `anchor` is a fast test, `regex` the proof where the anchor occurs."""

    kind: Kind
    what: str
    anchor: bytes
    regex: re.Pattern[bytes] | None = None


PATTERNS = (
    Pattern("private key", "a private key (PEM)", b"PRIVATE KEY-----",
            re.compile(rb"PRIVATE KEY-----(\\n|\s)+([\w-]+: [^\n]*\s+)*[A-Za-z0-9+/=]{40}")),
    *(Pattern("token", "an AWS access key", prefix, re.compile(prefix + rb"[0-9A-Z]{16}(?![0-9A-Za-z])"))
      for prefix in (b"AKIA", b"ASIA")),
    *(Pattern("token", "a GitHub token", prefix, re.compile(prefix + rb"[A-Za-z0-9]{36}"))
      for prefix in (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_")),
    Pattern("token", "a GitHub token", b"github_pat_", re.compile(rb"github_pat_\w{60}")),
    Pattern("token", "a Hugging Face token", b"hf_", re.compile(rb"hf_[A-Za-z0-9]{34}(?![A-Za-z0-9_])")),
    Pattern("token", "an OpenAI key", b"T3BlbkFJ", re.compile(rb"sk-[\w-]{8,120}T3BlbkFJ[\w-]{20}")),
    Pattern("token", "a JSON web token", b"eyJ",
            re.compile(rb"eyJ[\w-]{10,2000}\.eyJ[\w-]{10,2000}\.[\w-]{20}")),
    Pattern("token", "a PyPI token", b"pypi-AgE", re.compile(rb"pypi-AgE[\w-]{50}")),
    Pattern("token", "a Lambda Cloud key", b"secret_", re.compile(rb"secret_[\w-]{1,64}_[0-9a-f]{32}\.\w{32}")),
    Pattern("password", "an address with a password", b"://",
            re.compile(rb"://([^\s/:@\"'`<>\\]{0,64}):([^\s/:@\"'`<>\\]{3,128})@(?=[\w.-]{3})")),
)  # fmt: skip
# Passwords of templates and examples: https://%s:%s@, https://${USER}:${TOKEN}@, https://user:password@host
TEMPLATE = re.compile(rb"%[^0-9A-Fa-f]|[{}$*()\[\]|]")
EXAMPLE = re.compile(rb"(my|the|some)?[_-]?(pass(word|wd)?|pwd?|secret|token|x+|redacted|bar|repo)\d*", re.IGNORECASE)
# Variables whose values are secrets.
SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_KEY|ACCESS_KEY_ID|PRIVATE_KEY|CREDENTIALS?)$", re.I
)


def search(pieces: Iterable[bytes], patterns: Iterable[Pattern]) -> set[Pattern]:
    """The patterns that occur in a content, which comes in pieces; across their borders too."""
    remaining, matched, tail = list(patterns), set(), b""
    for piece in pieces:
        text = tail + piece
        for pattern in [p for p in remaining if p.anchor in text and occurs(p, text)]:
            matched.add(pattern)
            remaining.remove(pattern)
        tail = text[-OVERLAP:]
    return matched


def occurs(pattern: Pattern, text: bytes) -> bool:
    """Whether a secret of this form stands in a text: not in the middle of a longer word, and no example."""
    if pattern.regex is None:
        return pattern.anchor in text
    return any(is_secret(pattern.kind, match) for match in pattern.regex.finditer(text))


def is_secret(kind: Kind, match: re.Match[bytes]) -> bool:
    """Whether a match is a secret: not the middle of a longer word, a template or an example."""
    if kind == "token":
        return not re.match(rb"\w", match.string[max(0, match.start() - 1) : match.start()])
    if kind == "password":
        user, password = match.groups()
        return user != password and not TEMPLATE.search(user + password) and not EXAMPLE.fullmatch(password)
    return True


def mask(text: str) -> str:
    """A text for a message: each secret and each password in an address is `***`."""
    data = text.encode(errors="replace")
    for pattern in PATTERNS:
        if pattern.regex is None or pattern.anchor not in data:
            continue
        data = pattern.regex.sub(b"://***@" if pattern.kind == "password" else b"***", data)
    return data.decode(errors="replace")
