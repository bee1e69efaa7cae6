"""What the output of a failed build means, as one line with the remedy. Pure.

Wording of BuildKit in engine 20.10 and buildx, apt 2.6, uv 0.13 and pip 23.
"""

import re

from fractal.errors import OutsideError


class BuildError(OutsideError):
    """The image could not be built: one line with the remedy."""


DISK_FULL = (
    "the engine's disk is full. `docker system df` shows what takes it, `docker builder prune` and "
    "`docker image prune -a` free it; nothing was tagged."
)
DISK_FULL_PATTERN = r"(?i)no space left on device|disk quota exceeded"
NETWORK_PATTERN = (
    r"(?i)Temporary failure resolving|Could not resolve|failed to lookup address|dns error|Connection refused"
    r"|network is unreachable|no such host|Temporary failure in name resolution|tcp connect error|i/o timeout"
)
NETWORK_THERE = (
    "a registry of packages is not to be reached from there ({0}; {last}). Wait and run it again, or build here: "
    "--on=here."
)
BASE_PATTERN = (
    r"pull access denied for [^\s,]+|manifest for \S+ not found|failed to resolve source metadata for [^\s:]+:\S+"
    r"|https?://\S+/v2/\S+/manifests/[^\s\"]+|\S+: not found: manifest unknown"
)
# Pattern -> message. {0} is the match, {1} its first group that took part; {step} the step that failed, {last} its last
# line. The first pattern that is found decides.
MESSAGES = (
    (DISK_FULL_PATTERN, DISK_FULL),
    (r"(?i)certificate verify failed|UnknownIssuer|invalid peer certificate|self.signed certificate",
     "a certificate is not trusted inside the build. Give your network's own: --ca=FILE or FRACTAL_CA."),
    (BASE_PATTERN, "its base is not to be had ({0}). Load it into the engine, or name another one: --base, or FROM in "
     "a Dockerfile."),
    (NETWORK_PATTERN, "the network is not to be reached from inside the build ({0}; {last}). Behind a proxy set "
     "http_proxy and https_proxy; with mirrors FRACTAL_DEBIAN_MIRROR and pip's index-url."),
    (r"E: Unable to locate package \S+|E: (?:Package|Version) '.* (?:has no installation candidate|was not found)",
     "Debian has no such package in the base's release ({0}). Check its name, or leave the version out."),
    (r"Hash mismatch for `([^`]+)`|DO NOT MATCH THE HASHES[\s\S]*?\n\s*(\S+==\S+)",
     "{1}: the file that was downloaded is not the one that was locked. If that is right: invoke lock."),
    (r"no version of (\S+?==\S+?)[, ]|not found in the package registry and you require (\S+?),"
     r"|Could not find a version that satisfies the requirement (\S+)",
     "No index has the Python package {1} for this Python and processor. Check name, version and index."),
    (r"No solution found when resolving[^\n]*\n(?:\s*\n)*\s*\S+ (Because .*(?:\n {4,}\S.*)*)",
     "the Python packages do not fit together. {1} Change a version."),
    (r'"/([^"]*)" not found', "{step}: the build context has no {1}. It is not there, or one of what never gets into "
     "an image: secrets, caches, weights, what .dockerignore names."),
)  # fmt: skip
# Lines with which the builder itself reports a failed step.
BUILDER_LINE = re.compile(
    r"------|> \[|\d+ \| |Dockerfile\.rendered:\d|executor failed running|process \"|ERROR: failed to solve: process"
)


def error_message(output: list[str], step: str, host: str = "") -> str:
    """One line, with the remedy where there is one, for the output of the step that failed. `host`: "" if here."""
    text = "\n".join(output)
    last = last_error(output)
    for pattern, message in MESSAGES:
        if host and pattern == NETWORK_PATTERN:
            message = NETWORK_THERE
        if match := re.search(pattern, text):
            groups = [" ".join(group.split())[:400] for group in match.groups() if group]
            return message.format(match[0].rstrip(":"), *groups, step=step, last=last)
    return f"{step}: {last}." if step else f"{last}."


def is_disk_full(text: str) -> bool:
    """Whether an error message tells of a full disk."""
    return re.search(DISK_FULL_PATTERN, text) is not None


def last_error(output: list[str]) -> str:
    """The last error in the failed step's own output, else its last line, else the builder's."""
    lines = [line.strip() for line in output if line.strip()]
    own = [line for line in lines if not BUILDER_LINE.match(line)]
    errors = [line for line in own if re.match(r"(E:|error|ERROR)", line)]
    codes = re.findall(r"exit code: \d+", "\n".join(lines))
    return (errors or own[-1:] or codes or lines or ["no reason given"])[-1][:300].rstrip(".")


def without_passwords(text: str) -> str:
    """A builder's output without the passwords in addresses."""
    return re.sub(r"(?<=://)[^/\s@]+(?=@)", "***", text)
