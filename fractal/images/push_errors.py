"""The errors of a push: an engine's or a registry's message as one line with the remedy."""

import re

from fractal.errors import OutsideError

# A registry's HOST[:PORT] in front of a repository; what has neither dot nor port is part of the path.
HOST = r"(?:localhost|[\w-]+(?:\.[\w-]+)+|[\w.-]+(?=:)|\[[0-9a-fA-F:]+\])(?::\d+)?"


class PushError(OutsideError):
    """The image could not be pushed: one line with the remedy."""


class PushConnectionError(PushError):
    """The connection to the registry broke or was never made; another attempt may succeed."""


# What the message holds -> the error and its text. Wording of engine 20.10 and registry 2.8. The first match decides.
ERRORS: tuple[tuple[str, type[PushError], str], ...] = (
    ("no basic auth credentials|unauthorized|authentication required| 401|incorrect username", PushError,
     "{registry} wants a login for {repository}: {reason}. Run: docker login {host}"),
    ("denied|forbidden| 403|insufficient_scope", PushError,
     "{registry} does not let this user push {repository}: {reason}. Ask for the right to, or log in as another user: "
     "docker login {host}"),
    ("http response to https client", PushError,
     "{registry} speaks plain HTTP: {reason}. If you trust the way to it, list it under insecure-registries in the "
     "engine's daemon.json and restart the engine."),
    ("x509:|certificate|tls: ", PushError,
     "The engine does not trust the certificate of {registry}: {reason}. Put the CA that signed it into "
     "/etc/docker/certs.d/{host}/ca.crt."),
    ("no space left on device", PushError,
     "A disk is full, here or at {registry}: {reason}. Make room and push again."),
    ("no such host|name resolution|server misbehaving|connection refused|timeout|timed out|deadline exceeded"
     "|no route to host|network is unreachable|eof|reset by peer|broken pipe|http status: 5|closed network connection"
     "|closed idle connection|blob upload", PushConnectionError,
     "{registry} does not answer, or broke off: {reason}. Check its name and port, the network and the registry's log; "
     "the same command goes on from there."),
    ("", PushError, "Pushing to {repository} failed: {reason}. Mend that and push again."),
)  # fmt: skip


def without_secrets(message: str) -> str:
    """A message without users and queries in its URLs: both can hold secrets."""
    message = re.sub(r"(\w+://)[^/@\s\"]*@", r"\1", message)
    return re.sub(r"(\w+://[^?\s\"]*)\?[^\s\"]*", r"\1", message)


def error_from_engine(message: str, repository: str) -> PushError:
    """The error that an engine's message stands for when it pushes to this repository."""
    first = repository.split("/")[0]
    host = first if re.fullmatch(HOST, first) else ""
    reason = without_secrets((message.strip().splitlines() or ["no reason given"])[0])[:300].rstrip(". ")
    kind, text = next((kind, text) for pattern, kind, text in ERRORS if re.search(pattern, reason.lower()))
    registry = host or "the default registry"
    return kind(text.format(registry=registry, repository=repository, host=host, reason=reason).rstrip())
