"""`fractal serve --http`: the application on a port, in the foreground, beside a sandbox of its own or a sidecar's."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fractal import console
from fractal.errors import InputError, OutsideError
from fractal.problems import sets
from fractal.sandbox.host.container import Sandbox
from fractal.sandbox.host.limits import Limits

TOKEN_VARIABLE = "FRACTAL_TOKEN"
SHORTEST_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """ "8080" (on loopback), "0.0.0.0:8080" or "[::1]:8080". Raises InputError."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"--http {text}: expected a port, or an address and a port, as 8080 or 0.0.0.0:8080.")
    return Address(host.strip("[]") or "127.0.0.1", int(port))


def access_token(address: Address, file: Path | None) -> str | None:
    """The token of a file, or of FRACTAL_TOKEN; None is allowed on loopback alone. Raises InputError."""
    from fractal.server.gate import is_loopback

    try:
        token = file.read_text().strip() if file else os.environ.get(TOKEN_VARIABLE, "")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--token-file {file}: cannot be read: {error}.") from error
    if token and len(token) < SHORTEST_TOKEN:
        raise InputError(f"the access token has {len(token)} characters; give it {SHORTEST_TOKEN} or more.")
    if not token and not is_loopback(address.host):
        raise InputError(
            f"--http {address.host}:{address.port} can be reached from other machines: give an access token, by "
            f"--token-file FILE or {TOKEN_VARIABLE}. A fresh one: openssl rand -hex 32."
        )
    return token or None


def serve(
    address: Address,
    *,
    token: str | None,
    problems: str | None,
    limits: Limits,
    max_requests: int,
    deadline_s: float,
    sandbox: dict[str, Any],
) -> None:
    """Serve until interrupted. Raises OutsideError where the extra is missing or the port is taken."""
    try:
        import uvicorn

        from fractal.server.app import make_app
    except ImportError as error:
        raise OutsideError(
            f"serve --http needs FastAPI and uvicorn ({error.name} is missing): pip install 'fractal[http]'."
        ) from error
    problem_set = sets.load(problems) if problems else None
    with Sandbox(limits=limits, **sandbox) as verifier:
        app = make_app(
            verifier,
            problem_set.by_id() if problem_set else None,
            problems_name=problem_set.name if problem_set else "",
            token=token,
            deadline_s=deadline_s,
            max_requests=max_requests,
        )
        config = uvicorn.Config(app, host=address.host, port=address.port, log_level="warning", access_log=False)
        server = uvicorn.Server(config)
        console.say(f"serve: {address.url}/verify, described at {address.url}/docs; end it with Ctrl-C")
        try:
            server.run()
        except KeyboardInterrupt:
            pass  # how a server ends
        except SystemExit as error:  # uvicorn's, when it could not begin
            raise OutsideError(f"--http {address.url}: the port is taken or not allowed; name another one.") from error
