"""`fractal doctor`: the sandbox is started and attacked, to see whether it protects on this machine."""

import os
from collections.abc import Iterator
from pathlib import Path

from fractal.errors import OutsideError
from fractal.install.doctor import Finding
from fractal.sandbox.host.conformance import run_conformance
from fractal.sandbox.host.container import Sandbox


def checks() -> Iterator[Finding]:
    """The image, each protection as seen from inside, and the conformance programs."""
    sidecar = os.environ.get("FRACTAL_SOCKET")
    try:
        with Sandbox(socket=Path(sidecar) if sidecar else None) as sandbox:
            yield Finding("sandbox image", "ok", sandbox.image)
            for name, check in sandbox.checks.items():
                yield Finding(f"sandbox: {name}", "ok" if check["ok"] else "missing", check["found"])
            for program, label in run_conformance(sandbox):
                good = label.status == program.status
                remedy = "" if good else f"expected {program.status}: do not run untrusted programs here"
                yield Finding(f"sandbox: {program.name}", "ok" if good else "missing", label.status, remedy)
    except OutsideError as error:
        yield Finding("sandbox", "missing", "does not start", str(error))
