"""How a request to Lambda's API fails: the class of each error, its remedy, and whether another try may help."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import msgspec
import requests
import urllib3.exceptions

from fractal.errors import OutsideError
from fractal.jsonl import parse

URL = "https://cloud.lambda.ai/api/v1"
KEYS_PAGE = "https://cloud.lambda.ai/api-keys"
INSTANCES_PAGE = "https://cloud.lambda.ai/instances"
RETRY_AFTER_MAX_S = 60.0  # a longer Retry-After is not believed


class CloudError(OutsideError):
    """The cloud did not do what was asked: one line with the remedy."""


class ApiError(CloudError):
    """A request failed. `code` is Lambda's, such as global/invalid-parameters; "" without a response of Lambda's."""

    def __init__(
        self,
        reason: str,
        remedy: str,
        *,
        code: str = "",
        retryable: bool = False,  # another try may succeed
        had_no_effect: bool = False,  # the request certainly changed nothing at Lambda
        retry_after_s: float = 0.0,  # the header Retry-After
    ) -> None:
        super().__init__(f"{reason}. {remedy}")
        self.reason, self.code, self.retry_after_s = reason, code, retry_after_s
        self.retryable, self.had_no_effect = retryable, had_no_effect


class AuthError(ApiError):
    """The key is wrong, or the account may not do this."""


class NotFoundError(ApiError):
    """The object does not exist; an instance, perhaps not yet."""


class CapacityError(ApiError):
    """No machine of this type is free in this region: the one error after which a launch tries the next region."""


class ConnectionLostError(ApiError):
    """No response, or a broken one."""


class LaunchUnknownError(CloudError):
    """A launch was requested, and whether it happened is unknown: it may be billed. Look for its name."""


def network_error(error: Exception, request: str, host: str) -> ConnectionLostError:
    """What failed on the way, in our own words: the libraries' messages may hold a proxy's password."""
    cause = getattr(error.args[0], "reason", None) if error.args else None  # urllib3's, within that of requests
    remedy, retryable, had_no_effect = "Check the network, and HTTPS_PROXY if there is one.", True, True
    if isinstance(error, requests.exceptions.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        what, retryable = f"{host} shows a certificate that is not trusted here", False
        remedy = "Something on the way intercepts the connection, or this machine's clock or certificates are old."
    elif isinstance(error, requests.exceptions.ProxyError | requests.exceptions.InvalidProxyURL):
        what, remedy = f"the proxy lets nothing through to {host}", "Correct or unset HTTPS_PROXY."
    elif isinstance(cause, urllib3.exceptions.NewConnectionError):
        what = f"{host} cannot be reached: {str(getattr(cause.__cause__, 'strerror', 'no connection')).lower()}"
    elif isinstance(error, requests.ConnectTimeout):
        what = f"{host} cannot be reached in time"
    elif isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
        what, had_no_effect = f"{host} does not answer in time", False
    else:
        what, had_no_effect = f"the connection to {host} broke", False
    return ConnectionLostError(f"{request}: {what}", remedy, retryable=retryable, had_no_effect=had_no_effect)


def response_data(status: int, headers: Mapping[str, str], body: bytes, request: str, secrets: Collection[str]) -> Any:
    """The field `data` of an HTTP response. Raises ApiError. `request` names it; `secrets` are kept out of messages."""
    try:
        content = parse(body, dict[str, Any])
    except (msgspec.DecodeError, ValueError, RecursionError):
        content = {}
    if 200 <= status < 300 and "data" in content:
        return content["data"]
    details = content.get("error")
    texts: dict[str, str] = {}
    if isinstance(details, dict):
        texts = {name: _one_line(text, secrets) for name, text in details.items() if isinstance(text, str)}
    raise _response_error(status, headers, texts, request)


def _response_error(status: int, headers: Mapping[str, str], texts: Mapping[str, str], request: str) -> ApiError:
    """`texts`: those of the response's error object."""
    explained = "code" in texts
    code, message = texts.get("code", f"http/{status}"), f"HTTP {status} without a reason"
    if explained:
        message = texts.get("message", "") or message
    reason = f"{request}: {message.rstrip('. ')} ({code})"
    if status == 429:
        remedy = "Something else uses this account's API as well: wait a minute, then run the command again."
        after_s = _retry_after_s(headers)
        return ApiError(reason, remedy, code=code, retryable=True, had_no_effect=True, retry_after_s=after_s)
    if status >= 500 or status == 408 or code.startswith("provider/"):
        remedy = "That is Lambda's side: try again in some minutes."
        return ApiError(reason, remedy, code=code, retryable=True, retry_after_s=_retry_after_s(headers))
    remedy = texts.get("suggestion", "") or "Correct the request."
    if status == 401 or (status == 403 and not explained):
        remedy = f"Check LAMBDA_API_KEY, or make a new key at {KEYS_PAGE}."
    if status in (401, 403):
        return AuthError(reason, remedy, code=code, had_no_effect=True)
    if not explained or status < 400:
        redirect = "It is a redirect, which is not followed with the key. " if 300 <= status < 400 else ""
        remedy = f"{redirect}Check FRACTAL_LAMBDA_URL (unset, it is {URL}), and any proxy on the way."
        return ApiError(f"{request}: HTTP {status}, which is no response of Lambda's API", remedy)
    kind: type[ApiError] = ApiError
    if code.endswith("/insufficient-capacity"):
        kind, remedy = CapacityError, "Try another region or type, or wait for capacity."
    elif code.endswith("/quota-exceeded"):
        remedy = f"Terminate what is not needed ({INSTANCES_PAGE}), or ask Lambda's support for a higher quota."
    elif status == 404 or code == "global/object-does-not-exist":
        kind = NotFoundError
    return kind(reason, remedy, code=code, had_no_effect=True)


def _one_line(text: str, secrets: Collection[str]) -> str:
    """A server's text as one printable line without the secrets."""
    for secret in secrets:
        if len(secret) >= 8:  # a shorter one is no secret, and may be part of ordinary words
            text = text.replace(secret, "***")
    return "".join(char for char in " ".join(text.split()) if char.isprintable())[:300]


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """The header Retry-After where it holds seconds, as Lambda's does; an HTTP date is not read."""
    text = headers.get("Retry-After", "").strip()
    return min(float(text), RETRY_AFTER_MAX_S) if re.fullmatch(r"[0-9]{1,9}", text) else 0.0
