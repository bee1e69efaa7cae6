"""Programs that show whether a sandbox protects: `fractal doctor` and the tests run them through the whole of it."""

from dataclasses import dataclass

from fractal.records import Label, Problem, Sample, Status
from fractal.sandbox.host.client import Verifier


@dataclass(frozen=True)
class Conformance:
    """A program, what it would prove if it passed, and the status it has to get."""

    name: str
    code: str
    status: Status
    test: str = "assert f() == 'done'"


PROGRAMS = (
    Conformance("an honest program passes", "def f():\n    return 'done'", "passed"),
    Conformance("a wrong program fails", "def f():\n    return 'wrong'", "failed"),
    Conformance(
        "candidates are not root and have no capabilities",
        "def f():\n    import ctypes, os\n    s = open('/proc/self/status').read()\n"
        "    assert os.getuid() > 0 and os.geteuid() > 0 and os.getgroups() == []\n"
        "    assert 'CapEff:\\t0000000000000000' in s and 'CapPrm:\\t0000000000000000' in s, s\n"
        "    assert ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 1 and 'Seccomp:\\t2' in s, s\n    return 'done'",
        "passed",
    ),
    Conformance("no sockets", "def f():\n    import socket\n    socket.socket()\n    return 'done'", "forbidden"),
    Conformance("no processes", "def f():\n    import os\n    os.fork()\n    return 'done'", "forbidden"),
    Conformance(
        "no programs", "def f():\n    import os\n    os.execv('/bin/sh', ['sh'])\n    return 'done'", "forbidden"
    ),
    Conformance("no writing outside scratch", "def f():\n    open('/tmp/x', 'w')\n    return 'done'", "error"),
    Conformance(
        "the judge cannot be signalled",
        "import os\ndef f():\n    for p in os.listdir('/proc'):\n        if p.isdigit() and int(p) != os.getpid():\n"
        "            try:\n                os.kill(int(p), 9)\n                return 'killed'\n"
        "            except (PermissionError, ProcessLookupError):\n                pass\n    return 'done'",
        "passed",
    ),
    Conformance("leaving early is not passing", "import os\ndef f():\n    os._exit(0)", "crashed"),
    Conformance("sys.exit is not passing", "import sys\nsys.exit(0)", "crashed"),
    Conformance(
        "an object that equals everything is not the answer",
        "class A:\n    def __eq__(self, other):\n        return True\ndef f():\n    return A()",
        "failed",
    ),
    Conformance(
        "threads work",
        "def f():\n    import threading\n    out = []\n    t = threading.Thread(target=lambda: out.append('done'))\n"
        "    t.start()\n    t.join()\n    return out[0]",
        "passed",
    ),
    Conformance("memory is limited", "def f():\n    return len(bytearray(1 << 40)) and 'done'", "memory"),
)


def run_conformance(sandbox: Verifier) -> list[tuple[Conformance, Label]]:
    """Run the programs; a label whose status is not its program's is a protection that does not hold."""
    problems = {
        str(number): Problem(str(number), "", "def f():\n    return 'done'", [program.test], "", "f", "test")
        for number, program in enumerate(PROGRAMS)
    }
    samples = [
        Sample(str(number), 0, "", program.code, "stop", 0, None, None, "conformance")
        for number, program in enumerate(PROGRAMS)
    ]
    return list(zip(PROGRAMS, sandbox.verify(samples, problems), strict=True))
