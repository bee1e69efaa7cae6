"""The ways in which a request to Lambda's API fails, and the class, remedy and retry rule of each.

`classify` looks at one response, or at the failure to get one; it does not know what the request was.
"""

import os
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import requests
import urllib3.exceptions

from fractal.cloud.lambda_types import printable
from fractal.errors import OutsideError
from fractal.jsonl import parse

URL = "https://cloud.lambda.ai/api/v1"
KEYS_PAGE = "https://cloud.lambda.ai/api-keys"
INSTANCES_PAGE = "https://cloud.lambda.ai/instances"


class CloudError(OutsideError):
    """The cloud did not do what was asked: one line with the remedy."""


class ApiError(CloudError):
    """Lambda's response was an error. `code` is stable, such as global/invalid-parameters; the message is not."""

    def __init__(self, text: str, *, code: str) -> None:
        super().__init__(text)
        self.code = code


class AuthError(ApiError):
    """The key is wrong, or the account may not do this."""


class RequestError(ApiError):
    """The request itself is refused, and will be again."""


class QuotaError(ApiError):
    """The account may have no more of these."""


class NotFoundError(ApiError):
    """The object does not exist; an instance, perhaps not yet."""


class CapacityError(ApiError):
    """No machine of this type is free in this region: the one error after which a launch tries the next region."""


class BusyError(ApiError):
    """Too many requests, after all retries."""


class ServerError(ApiError):
    """Lambda or its provider is in trouble, after all retries."""


class ConnectionLostError(CloudError):
    """No response, or a broken one, after all retries."""


class LaunchUnknownError(CloudError):
    """A launch was requested, and whether it happened is unknown: it may be billed. Look for its name."""


@dataclass(frozen=True, slots=True)
class Response:
    """An HTTP response."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)  # may hold a jupyter_token


@dataclass(frozen=True, slots=True)
class NetworkFailure:
    """No whole response arrived."""

    reason: str
    remedy: str
    maybe_sent: bool  # False: the request certainly did not reach the API
    permanent: bool = False  # the next try would fail the same way


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one request resulted in: data, or an error and whether the request may be repeated."""

    data: Any = None
    error: CloudError | None = None
    reason: str = ""  # the error without its remedy
    retryable: bool = False  # another try may succeed
    had_no_effect: bool = False  # the request certainly changed nothing at Lambda
    retry_after_s: float | None = None  # the header Retry-After
    malformed: bool = False  # the body is no JSON


def network_failure(error: BaseException, host: str) -> NetworkFailure:
    """What failed on the way, in our own words: the libraries' messages may hold a proxy's password."""
    chain = list(_causes(error))
    network = "Check the network, and HTTPS_PROXY if there is one."

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in chain)

    if has(ssl.SSLCertVerificationError):
        return NetworkFailure(
            f"{host} shows a certificate that is not trusted here",
            "Something on the way intercepts the connection, or this machine's clock or certificates are out of date.",
            maybe_sent=False,
            permanent=True,
        )
    if has(requests.exceptions.ProxyError, urllib3.exceptions.ProxyError):
        reason = f"the proxy lets nothing through to {host}"
        return NetworkFailure(reason, "Correct or unset HTTPS_PROXY.", maybe_sent=False)
    if has(urllib3.exceptions.NameResolutionError):
        return NetworkFailure(f"the name {host} cannot be resolved", network, maybe_sent=False)
    if has(urllib3.exceptions.NewConnectionError):
        number = next((cause.errno for cause in chain if isinstance(cause, OSError) and cause.errno), None)
        detail = os.strerror(number).lower() if isinstance(number, int) else "no connection"
        return NetworkFailure(f"{host} cannot be reached: {detail}", network, maybe_sent=False)
    if has(requests.ConnectTimeout, urllib3.exceptions.ConnectTimeoutError):
        return NetworkFailure(f"{host} cannot be reached in time", network, maybe_sent=False)
    if has(
        requests.exceptions.InvalidProxyURL, requests.exceptions.InvalidSchema, urllib3.exceptions.LocationParseError
    ):
        reason = "the proxy's address is not usable"
        return NetworkFailure(reason, "Correct HTTPS_PROXY.", maybe_sent=False, permanent=True)
    if has(requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError):
        return NetworkFailure(f"{host} does not answer in time", network, maybe_sent=True)
    return NetworkFailure(f"the connection to {host} broke", network, maybe_sent=True)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it wraps, in whichever attribute requests and urllib3 keep them."""
    pending: list[object] = [error]
    seen: set[int] = set()
    while pending:
        cause = pending.pop(0)
        if not isinstance(cause, BaseException) or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        pending += [*cause.args, getattr(cause, "reason", None), getattr(cause, "original_error", None)]
        pending.append(cause.__cause__)  # not the context: that may be an error of our caller


def classify(response: Response | NetworkFailure, request: str, key: str) -> Outcome:
    """The outcome of one try. `request` names it in messages; `key` is kept out of them."""
    if isinstance(response, NetworkFailure):
        reason = f"{request}: {response.reason}"
        error: CloudError = ConnectionLostError(f"{reason}. {response.remedy}")
        no_effect = not response.maybe_sent
        return Outcome(error=error, reason=reason, retryable=not response.permanent, had_no_effect=no_effect)
    status = response.status
    try:
        content = parse(response.body, Any)
        malformed = False
    except (msgspec.DecodeError, ValueError, RecursionError):
        content, malformed = None, True
    if 200 <= status < 300:
        return _success(content, malformed, request, status)
    details = content.get("error") if isinstance(content, dict) else None
    if not isinstance(details, dict) or not isinstance(details.get("code"), str):
        details = {}
    code = _one_line(details["code"], key, 100) if details else f"http/{status}"
    message = _text(details, "message", key) or f"HTTP {status} without a reason"
    error_class, remedy = _error_class(status, code, explained=bool(details))
    if error_class is None:
        reason = f"{request}: HTTP {status}, which is no response of Lambda's API"
        return Outcome(error=CloudError(f"{reason}. {remedy}"), reason=reason)
    reason = f"{request}: {message.rstrip('. ')} ({code})"
    remedy = remedy or _text(details, "suggestion", key) or "Correct the request."
    return Outcome(
        error=error_class(f"{reason}. {remedy}", code=code),
        reason=reason,
        retryable=error_class in (BusyError, ServerError),
        had_no_effect=error_class is not ServerError,
        retry_after_s=_retry_after_s(response.headers),
    )


def _success(content: object, malformed: bool, request: str, status: int) -> Outcome:
    if malformed:
        reason = f"{request}: the response is no whole JSON"
        error: CloudError = ConnectionLostError(f"{reason}. {_check_url_remedy(status)}")
        return Outcome(error=error, reason=reason, retryable=True, malformed=True)
    if not isinstance(content, dict) or "data" not in content:
        reason = f"{request}: the response has no field `data`"
        return Outcome(error=CloudError(f"{reason}. {_check_url_remedy(status)}"), reason=reason)
    return Outcome(data=content["data"])


def _error_class(status: int, code: str, *, explained: bool) -> tuple[type[ApiError] | None, str]:
    """The error's class, and our remedy where it is better than Lambda's suggestion.

    No class: the response is not Lambda's. `explained`: it has an error object with a code.
    """
    if status == 429:
        return BusyError, "Something else uses this account's API as well: wait a minute, then run the command again."
    if status >= 500 or status == 408 or code.startswith("provider/"):
        return ServerError, "That is Lambda's side: try again in some minutes."
    if status in (401, 403):
        check_key = f"Check LAMBDA_API_KEY, or make a new key at {KEYS_PAGE}."
        return AuthError, "" if status == 403 and explained else check_key
    if not explained or status < 400:
        return None, _check_url_remedy(status)
    if code.endswith("/insufficient-capacity"):
        return CapacityError, "Try another region or type, or wait for capacity."
    if code.endswith("/quota-exceeded"):
        remedy = f"Terminate what is not needed ({INSTANCES_PAGE}), or ask Lambda's support for a higher quota."
        return QuotaError, remedy
    if status == 404 or code == "global/object-does-not-exist":
        return NotFoundError, ""
    return RequestError, ""


def _check_url_remedy(status: int) -> str:
    redirect = "It is a redirect, which is not followed with the key. " if 300 <= status < 400 else ""
    return f"{redirect}Check FRACTAL_LAMBDA_URL (unset, it is {URL}), and any proxy on the way."


def _text(details: Mapping[str, Any], name: str, key: str) -> str:
    value = details.get(name)
    return _one_line(value, key, 300) if isinstance(value, str) else ""


def _one_line(text: str, key: str, length: int) -> str:
    """A server's text as one printable line without the key."""
    if len(key) >= 8:  # a shorter one is no secret, and may be part of ordinary words
        text = text.replace(key, "***")
    text = printable(" ".join(text.split()))
    return text if len(text) <= length else text[:length] + "..."


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The header Retry-After where it holds seconds, as Lambda's does; an HTTP date is not read."""
    text = next((value for name, value in headers.items() if name.lower() == "retry-after"), "").strip()
    return float(text) if re.fullmatch(r"[0-9]{1,9}", text) else None
