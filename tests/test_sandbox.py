"""The hard verifier against the real thing: a real container, hostile programs, and honest ones that look odd."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import docker
import pytest

from fractal.errors import InputError
from fractal.problems.formats import read_problems
from fractal.records import Label, Problem, Sample
from fractal.sandbox.host.container import Sandbox, SandboxError, probe
from fractal.sandbox.host.limits import Limits
from fractal.sandbox.inside import checks
from tests.conftest import ROOT, SHARED

pytestmark = pytest.mark.sandbox
CORRECT = "def f(x):\n    return x * 2\n"
TESTS = ["assert f(1) == 2", "assert f(21) == 42", "assert f('ab') == 'abab'"]


def problem(tests: list[str] = TESTS, reference: str = CORRECT, setup: str = "", task_id: int = 1) -> Problem:
    return Problem(task_id, "double", reference, tests, setup, "f", "test")


def sample(code: str, sample_id: int = 0, task_id: int = 1) -> Sample:
    return Sample(task_id, sample_id, "", code, "stop", 0, None, None, "test")


def judge(sandbox: Sandbox, code: str, tests: list[str] = TESTS, setup: str = "", reference: str = CORRECT) -> Label:
    (label,) = sandbox.verify([sample(code)], {1: problem(tests, reference, setup)})
    return label


def plain(code: str, tests: list[str], setup: str = "") -> bool:
    """Plain evaluation in a fresh interpreter: program, setup and tests in one namespace."""
    text = "import sys\nns = {}\nfor part in sys.argv[1:]:\n    exec(part, ns)\n"
    command = [sys.executable, "-I", "-S", "-c", text, code, setup, *tests]
    with tempfile.TemporaryDirectory() as folder:  # programs may write files
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    return done.returncode == 0


def test_every_protection_is_in_force_as_seen_from_inside(sandbox: Sandbox) -> None:
    assert {name: check["ok"] for name, check in sandbox.checks.items()} == dict.fromkeys(sandbox.checks, True)
    assert len(sandbox.checks) >= 10


def test_the_conformance_programs_get_their_status(sandbox: Sandbox) -> None:
    assert [(one.name, label.status) for one, label in probe(sandbox)] == [(o.name, o.status) for o in checks.PROBES]


WRONG = "def f(x):\n    return None\n"
HOSTILE = {
    "sys.exit at import": "import sys\nsys.exit(0)",
    "os._exit at import": "import os\nos._exit(0)",
    "os._exit in the call": "import os\ndef f(x):\n    os._exit(0)",
    "SystemExit in the call": "def f(x):\n    raise SystemExit(0)",
    "exit builtin": "def f(x):\n    exit()",
    "KeyboardInterrupt": "def f(x):\n    raise KeyboardInterrupt",
    "always equal": "class A:\n    __eq__ = lambda s, o: True\n    __hash__ = None\ndef f(x):\n    return A()",
    "always equal int": "class A(int):\n    def __eq__(s, o):\n        return True\n    def __ne__(s, o):\n        return False\ndef f(x):\n    return A(1)",
    "always equal str": "class A(str):\n    def __eq__(s, o):\n        return True\n    __hash__ = str.__hash__\ndef f(x):\n    return A('z')",
    "equal by reflection": "class A(list):\n    def __eq__(s, o):\n        return True\ndef f(x):\n    return A()",
    "unittest.mock.ANY": "from unittest.mock import ANY\ndef f(x):\n    return ANY",
    "patches builtins": "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.len = lambda x: 0\n" + WRONG,
    "shadows the test's builtins": "set = sorted = len = abs = lambda *a: 0\n" + WRONG,
    "walks the frames": "import sys\ndef f(x):\n    fr = sys._getframe()\n    while fr:\n        for k, v in list(fr.f_locals.items()) + list(fr.f_globals.items()):\n            if k in ('expected', 'results', 'status', 'passed'):\n                return v\n        fr = fr.f_back\n",
    "searches the heap": "import gc\ndef f(x):\n    for o in gc.get_objects():\n        if isinstance(o, str) and 'assert f' in o:\n            return eval(o.split('==')[1])\n",
    "searches all modules": "import sys\ndef f(x):\n    for m in list(sys.modules.values()):\n        for v in list(getattr(m, '__dict__', {}).values()):\n            if isinstance(v, str) and 'assert' in v and '==' in v:\n                return v\n",
    "forges frames on every descriptor": "import os, json, struct\ndef f(x):\n    b = json.dumps({'type': 'verdict', 'id': 1, 'status': 'passed', 'tests': ['passed'] * 3}).encode()\n    m = struct.pack('>I', len(b)) + b\n    for fd in range(64):\n        try:\n            os.write(fd, m)\n        except OSError:\n            pass\n",
    "writes passed everywhere": "import os\ndef f(x):\n    for fd in range(3, 64):\n        try:\n            os.write(fd, b'passed\\n\\x01\\x00\\x00\\x00')\n        except OSError:\n            pass\n",
    "answers ahead of the question": "import os, json, struct\nb = json.dumps(['r', True]).encode()\nfor _ in range(9):\n    os.write(3, struct.pack('>I', len(b)) + b)\n" + WRONG,
    "replaces its own encoder": "import sys\nfor n, m in list(sys.modules.items()):\n    for k in ('pack', 'Encoder', 'json'):\n        if hasattr(m, k):\n            try:\n                setattr(m, k, None)\n            except Exception:\n                pass\n" + WRONG,
    "patches json": "import json\njson.dumps = lambda *a, **k: '[\"r\",true]'\njson.loads = lambda *a, **k: ['r', True]\n" + WRONG,
    "reads the judge's memory": "import os\ndef f(x):\n    for p in os.listdir('/proc'):\n        if p.isdigit() and p != str(os.getpid()):\n            return open(f'/proc/{p}/mem', 'rb').read(10)\n",
    "reads the judge's environment": "import os\ndef f(x):\n    return [open(f'/proc/{p}/environ').read() for p in os.listdir('/proc') if p.isdigit()]\n",
    "kills everything": "import os\ndef f(x):\n    os.kill(-1, 9)\n",
    "stops itself": "import os, signal\ndef f(x):\n    os.kill(os.getpid(), signal.SIGSTOP)\n",
    "segfault": "import ctypes\ndef f(x):\n    ctypes.string_at(0)\n",
    "abort": "import os\ndef f(x):\n    os.abort()\n",
    "closes its channel": "import os\ndef f(x):\n    os.closerange(0, 64)\n    while True:\n        pass\n",
    "half a frame": "import os\ndef f(x):\n    os.write(3, b'\\x00\\x00\\x10\\x00abc')\n    while True:\n        pass\n",
    "a frame of 4 GB": "import os\ndef f(x):\n    os.write(3, b'\\xff\\xff\\xff\\xffabc')\n",
    "raises the test's own error": "def f(x):\n    raise AssertionError\n",
    "endless iterator": "import itertools\ndef f(x):\n    return itertools.count()\n",
    "cyclic list": "def f(x):\n    a = []\n    a.append(a)\n    return a\n",
    "deep list": "def f(x):\n    a = []\n    for _ in range(100000):\n        a = [a]\n    return a\n",
    "exception with a payload": "class E(Exception):\n    def __str__(self):\n        import os\n        os._exit(0)\ndef f(x):\n    raise E\n",
    "a class that runs on getattr": "class A:\n    def __getattribute__(self, n):\n        raise SystemExit\ndef f(x):\n    return A()\n",
    "redefines the entry point as a value": "f = True",
    "metaclass always true": "class M(type):\n    def __instancecheck__(c, o):\n        return True\n    def __eq__(c, o):\n        return True\n    __hash__ = None\nclass f(metaclass=M):\n    def __init__(self, x):\n        pass\n",
}  # fmt: skip
CONTAINED = {
    "tcp": "import socket\ns = socket.socket(socket.AF_INET)",
    "unix": "import socket\ns = socket.socket(socket.AF_UNIX)",
    "netlink": "import socket\ns = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "fork": "import os\nif os.fork() == 0:\n    os._exit(0)",
    "subprocess": "import subprocess\nsubprocess.run(['true'], check=True)",
    "os.system": "import os\nassert os.system('true') == 0",
    "multiprocessing": "import multiprocessing as m\np = m.Process(target=print)\np.start()\np.join()",
    "setuid": "import os\nos.setuid(0)",
    "chroot": "import os\nos.chroot('.')",
    "mount": "import ctypes\nif ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0):\n    raise OSError",
    "unshare": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000):\n    raise OSError",
    "ptrace": "import ctypes\nif ctypes.CDLL(None).ptrace(16, 1, 0, 0):\n    raise OSError",
    "memfd": "import os\nos.memfd_create('x')",
    "shared memory": "from multiprocessing import shared_memory\nshared_memory.SharedMemory('x', create=True, size=9)",
    "write /tmp": "open('/tmp/x', 'w')",
    "write /sandbox": "import glob\nopen(glob.glob('/sandbox/**/*.py', recursive=True)[0], 'a')",
    "write /dev/shm": "open('/dev/shm/x', 'w')",
    "docker socket": "open('/var/run/docker.sock')",
    "run from scratch": "import os, ctypes\nopen('a.so', 'wb').write(b'')\nctypes.CDLL(os.path.abspath('a.so'))",
    "raise the limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "device": "import os\nos.mknod('x', 0o600 | 0o020000, os.makedev(1, 1))",
    "keyring": "import ctypes\nif ctypes.CDLL(None).syscall(248, b'user', b'x', b'y', 1, -2) < 0:\n    raise OSError",
    "io_uring": "import ctypes\nif ctypes.CDLL(None).syscall(425, 1, 0) < 0:\n    raise OSError",
    "bpf": "import ctypes\nif ctypes.CDLL(None).syscall(321, 0, 0, 0) < 0:\n    raise OSError",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_wrong_program_never_passes(sandbox: Sandbox, name: str) -> None:
    label = judge(sandbox, HOSTILE[name])
    assert label.status not in ("passed", "sandbox_error"), label
    assert judge(sandbox, CORRECT + f"# after {name}").status == "passed"


@pytest.mark.parametrize("name", CONTAINED)
def test_a_forbidden_act_never_succeeds(sandbox: Sandbox, name: str) -> None:
    body = "".join(f"    {line}\n" for line in CONTAINED[name].splitlines())
    label = judge(sandbox, f"def f(x):\n{body}    return x * 2\n")
    assert label.status in ("forbidden", "error", "crashed", "memory"), label


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("def f(x):\n    while True: pass\n", "timeout"),
        ("while True: pass\n", "timeout"),
        ("import time\ndef f(x):\n    time.sleep(60)\n", "timeout"),
        ("def f(x):\n    return 'a' * (1 << 40)\n", "memory"),
        ("x = [0] * (1 << 28)\ny = [0] * (1 << 28)\n", "memory"),
        ("def f(x):\n    return f(x)\n", "error"),
        ("def f(x:\n", "syntax_error"),
        ("a\0b", "syntax_error"),
        ("(" * 5000 + ")" * 5000, "syntax_error"),
        ("def g(x):\n    return x * 2\n", "missing"),
        ("", "missing"),
        ("def f(x):\n    return x + 1\n", "failed"),
        ("def f(x):\n    return 1 / 0\n", "error"),
        ("raise ValueError('no')\n" + CORRECT, "error"),
        ("import os\ndef f(x):\n    os._exit(3)\n", "crashed"),
        ("import re\ndef f(x):\n    return re.match('(a+)+$', 'a' * 40 + 'b')\n", "timeout"),
        ("import threading, time\ndef f(x):\n    while True:\n        threading.Thread(target=time.sleep, args=(9,)).start()\n", "error"),
        ("def f(x):\n    files = [open('/dev/null') for _ in range(1000)]\n", "error"),
        ("def f(x):\n    open('big', 'w').write('x' * (1 << 25))\n", "error"),
        ("def f(x):\n    for i in range(10**6):\n        open(str(i), 'w')\n", "error"),
        ("def f(x):\n    print('x' * 10_000_000)\n    return x * 2\n", "passed"),
        ("def f(x):\n    return {i * (2**61 - 1) for i in range(60000)}\n", "timeout"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)  # fmt: skip
def test_every_ending_has_its_status(sandbox: Sandbox, code: str, status: str) -> None:
    label = judge(sandbox, code)
    assert label.status == status, label
    assert judge(sandbox, CORRECT + f"# after {status}").status == "passed"


def test_a_program_of_200_000_lines_passes(place: dict[str, Any]) -> None:
    """At the limits that a user has: compiling it takes about the second of CPU that the shared sandbox gives."""
    with Sandbox(**place) as one:
        label = judge(one, "x = 1\n" * 200_000 + CORRECT)
        assert label.status == "passed", label
        assert judge(one, CORRECT + "# after passed").status == "passed"


HONEST: dict[str, tuple[str, list[str], str]] = {
    "mutates its argument": ("def f(a):\n    a.sort()\n", ["x = [3, 1, 2]\nassert f(x) is None\nassert x == [1, 2, 3]"], ""),
    "mutates inside": ("def f(d):\n    d['a'].append(1)\n", ["d = {'a': []}\nk = d['a']\nf(d)\nassert k == [1] and d == {'a': [1]}"], ""),
    "set": ("def f():\n    return {1, 2}\n", ["assert f() == {2, 1}"], ""),
    "frozenset in dict": ("def f():\n    return {frozenset([1]): (1, [2])}\n", ["assert f() == {frozenset({1}): (1, [2])}"], ""),
    "Counter": ("from collections import Counter\ndef f(s):\n    return Counter(s)\n", ["assert f('aab') == {'a': 2, 'b': 1}", "assert f('ab').most_common(1) == [('a', 1)]"], ""),
    "defaultdict": ("from collections import defaultdict\ndef f():\n    d = defaultdict(list)\n    d[1].append(2)\n    return d\n", ["assert f() == {1: [2]}"], ""),
    "named tuple": ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f():\n    return P(1, 2)\n", ["assert f() == (1, 2)", "assert f().x == 1"], ""),
    "Decimal": ("from decimal import Decimal\ndef f():\n    return Decimal('1.10')\n", ["assert str(f()) == '1.10'"], ""),
    "Fraction": ("from fractions import Fraction\ndef f():\n    return Fraction(1, 3)\n", ["assert f() * 3 == 1"], ""),
    "datetime": ("import datetime\ndef f():\n    return datetime.date(2020, 1, 2)\n", ["assert f().year == 2020"], ""),
    "generator": ("def f(n):\n    yield from range(n)\n", ["assert list(f(200)) == list(range(200))", "assert next(f(3)) == 0"], ""),
    "map object": ("def f(a):\n    return map(str, a)\n", ["assert list(f([1, 2])) == ['1', '2']"], ""),
    "dict views": ("def f(d):\n    return d.keys()\n", ["assert f({1: 2}) == {1}", "assert 1 in f({1: 2})"], ""),
    "dict values": ("def f(d):\n    return d.values()\n", ["assert sorted(f({1: 2, 3: 1})) == [1, 2]"], ""),
    "returns a function": ("def f(a):\n    return lambda b: a + b\n", ["assert f(1)(2) == 3"], ""),
    "takes a function": ("def f(g, a):\n    return [g(x) for x in a]\n", ["assert f(lambda x: x + 1, [1, 2]) == [2, 3]", "assert f(str, [1]) == ['1']", "assert f(max, [[1, 2]]) == [2]"], ""),
    "takes an iterator": ("def f(it):\n    return sum(it)\n", ["assert f(iter([1, 2])) == 3", "assert f(x for x in (1, 2)) == 3"], ""),
    "NaN": ("def f():\n    return float('nan')\n", ["x = f()\nassert x != x"], ""),
    "huge integer": ("def f():\n    return 10**4000\n", ["assert f() == 10**4000"], ""),
    "match object": ("import re\ndef f(s):\n    return re.match('a(b)', s)\n", ["assert f('ab')", "assert f('ab').group(1) == 'b'", "assert not f('x')"], ""),
    "own class": ("class P:\n    def __init__(self, x):\n        self.x = x\n    def double(self):\n        return self.x * 2\ndef f(x):\n    return P(x)\n", ["assert f(2).x == 2", "assert f(2).double() == 4"], ""),
    "the test builds its class": ("class Node:\n    def __init__(self, v):\n        self.v = v\n        self.left = None\ndef f(n):\n    return 0 if n is None else 1 + f(n.left)\n", ["assert f(root) == 2"], "root = Node(1)\nroot.left = Node(2)"),
    "raises what the test expects": ("def f(x):\n    raise ValueError('bad', x)\n", ["try:\n    f(3)\n    assert False\nexcept ValueError as e:\n    assert e.args == ('bad', 3)"], ""),
    "raises its own class": ("class Bad(KeyError):\n    pass\ndef f():\n    raise Bad('x')\n", ["try:\n    f()\n    assert False\nexcept KeyError:\n    pass"], ""),
    "the test imports": ("def f(x):\n    return x ** 0.5\n", ["import math\nassert math.isclose(f(2), math.sqrt(2))"], ""),
    "setup's import reaches the program": ("def f(x):\n    return math.floor(x)\n", ["assert f(2.5) == 2"], "import math"),
    "state between tests": ("n = 0\ndef f():\n    global n\n    n += 1\n    return n\n", ["assert f() == 1", "assert f() == 2"], ""),
    "threads": ("import threading\ndef f(n):\n    out = []\n    ts = [threading.Thread(target=out.append, args=(i,)) for i in range(n)]\n    [t.start() for t in ts]\n    [t.join() for t in ts]\n    return sorted(out)\n", ["assert f(5) == [0, 1, 2, 3, 4]"], ""),
    "recursion to 900": ("def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\n", ["assert f(900) == 900"], ""),
    "50 MB": ("def f():\n    return 'x' * 50_000_000\n", ["assert len(f()) == 50_000_000"], ""),
    "main block": ("def f(x):\n    return x\nif __name__ == '__main__':\n    f(int(input()))\n", ["assert f(1) == 1"], ""),
    "dataclass": ("from __future__ import annotations\nfrom dataclasses import dataclass, field\n@dataclass\nclass P:\n    x: int\n    y: list[int] = field(default_factory=list)\ndef f():\n    return P(1).x\n", ["assert f() == 1"], ""),
    "writes a file in its folder": ("import tempfile\ndef f():\n    with open('a', 'w') as o:\n        o.write('hi')\n    with tempfile.TemporaryFile('w+') as t:\n        t.write('x')\n    return open('a').read()\n", ["assert f() == 'hi'"], ""),
    "keyword arguments": ("def f(*, a, b=2):\n    return a, b\n", ["assert f(a=1) == (1, 2)"], ""),
    "enum": ("import enum\nclass C(enum.IntEnum):\n    A = 1\ndef f():\n    return C.A\n", ["assert f() == 1"], ""),
    "global constant": ("LIMIT = [1, 2]\ndef f():\n    return LIMIT\n", ["assert f() == LIMIT"], ""),
    "prints": ("def f(x):\n    print(x)\n    return x\n", ["assert f(1) == 1"], ""),
    "wrong, plainly": ("def f(x):\n    return x\n", ["assert f(1) == 2"], ""),
    "name missing": ("import math\n", ["assert f(1) == 2"], ""),
    "tuple is not list": ("def f():\n    return (1, 2)\n", ["assert f() == [1, 2]"], ""),
    "True is 1": ("def f():\n    return 1\n", ["assert f() == True"], ""),
    "identity of booleans": ("def f():\n    return 1\n", ["assert f() is True"], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_gets_the_label_of_plain_evaluation(sandbox: Sandbox, name: str) -> None:
    code, tests, setup = HONEST[name]
    label = judge(sandbox, code, tests, setup, reference=code)
    assert label.passed == plain(code, tests, setup), label


def test_all_tests_run_and_the_first_that_fails_decides(sandbox: Sandbox) -> None:
    label = judge(sandbox, "def f(x):\n    if x == 1:\n        return 0\n    if x == 2:\n        return 1 / 0\n    return 7\n", ["assert f(1) == 1", "assert f(2) == 1", "assert f(3) == 7"])  # fmt: skip
    assert (label.status, label.tests) == ("failed", ["failed", "error", "passed"])


def test_the_detail_keeps_type_message_and_what_was_printed(sandbox: Sandbox) -> None:
    label = judge(sandbox, "def f(x):\n    print('so far')\n    raise KeyError('nope')\n")
    assert "KeyError" in label.detail
    assert "nope" in label.detail
    assert "so far" in label.detail


def test_files_of_one_sample_are_gone_for_the_next(sandbox: Sandbox) -> None:
    write = "import os\ndef f(x):\n    not os.path.exists('a') and os.makedirs('a/b')\n    os.chmod('a', 0)\n    return x * 2\n"
    look = "import os\ndef f(x):\n    return x * 2 if os.listdir('.') == [] else None\n"
    codes = [write, look + "#1", write + "#2", look + "#3"] * 2
    labels = sandbox.verify([sample(code + "#" * i, i) for i, code in enumerate(codes)], {1: problem()})
    assert [label.status for label in labels] == ["passed"] * 8


def test_labels_come_in_the_order_of_the_samples_one_each(sandbox: Sandbox) -> None:
    slow = "import time\ndef f(x):\n    time.sleep(0.3)\n    return x * 2\n"
    samples = [sample(slow if i % 7 == 0 else CORRECT + f"#{i}", i) for i in range(60)]
    labels = list(sandbox.verify(samples, {1: problem()}))
    assert [label.sample_id for label in labels] == list(range(60))
    assert all(label.passed for label in labels)


def test_identical_programs_run_once(image: str) -> None:
    sleepy = "import time\ndef f(x):\n    time.sleep(0.5)\n    return x * 2\n"
    with Sandbox(image=image) as sandbox:
        start = time.monotonic()
        labels = list(sandbox.verify([sample(sleepy, i) for i in range(50)], {1: problem()}))
    assert all(label.passed for label in labels)
    assert len({label.seconds for label in labels}) == 1
    assert time.monotonic() - start < 20  # not 75: a deadline for a hang, no measurement


def test_a_slow_reference_raises_the_limit(image: str) -> None:
    """A program that needs as long as its reference is not a timeout, however short the default."""
    busy = "import time\ndef f(x):\n    while time.process_time() < %s:\n        pass\n    return x * 2\n"
    with Sandbox(limits=Limits(cpu_s=0.3, wall_s=5), image=image) as sandbox:
        patient = problem(reference=busy % 0.6)
        hasty = problem(task_id=2)
        (first,) = sandbox.verify([sample(busy % 0.8)], {1: patient})
        (second,) = sandbox.verify([sample(busy % 0.8, task_id=2)], {2: hasty})
    assert (first.status, second.status) == ("passed", "timeout")


def test_a_container_killed_in_the_middle_loses_nothing(image: str) -> None:
    slow = "import time\ndef f(x):\n    time.sleep(0.05)\n    return x * 2\n"
    samples = [sample(slow + f"#{i}", i) for i in range(60)]
    with Sandbox(image=image) as sandbox:
        labels = []
        for label in sandbox.verify(samples, {1: problem()}):
            labels.append(label)
            if len(labels) == 10:
                sandbox._line.container.kill()
    assert [(label.sample_id, label.status) for label in labels] == [(i, "passed") for i in range(60)]


def test_no_container_is_left_when_the_client_is_killed(image: str, tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(
        "import sys, time\nfrom fractal.sandbox.host.container import Sandbox\n"
        f"with Sandbox(image={image!r}) as s:\n    print(s._line.container.id, flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    container = child.stdout.readline().strip()
    assert container
    child.kill()
    child.wait()
    child.stdout.close()
    client = docker.from_env()
    for _ in range(100):
        if container not in {c.id for c in client.containers.list(all=True)}:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the container is still there")
    client.close()


def test_nothing_is_left_after_many_samples(image: str) -> None:
    """No zombie, no process, no growing memory in the container."""
    codes = [CORRECT, HOSTILE["segfault"], HOSTILE["os._exit in the call"], WRONG]
    with Sandbox(image=image) as sandbox:
        container = sandbox._line.container
        samples = [sample(codes[i % 4] + f"#{i}", i) for i in range(400)]
        first = list(sandbox.verify(samples[:100], {1: problem()}))
        before = container.top()["Processes"]
        list(sandbox.verify(samples[100:], {1: problem()}))
        after = container.top()["Processes"]
    assert len(after) == len(before), after
    assert not [row for row in after if "defunct" in " ".join(row)]
    assert Counter(label.status for label in first) == {"passed": 25, "crashed": 50, "failed": 25}


@pytest.mark.docker
def test_an_unknown_image_says_how_to_build_it() -> None:
    with pytest.raises(SandboxError, match=r"fractal\.images\.build"), Sandbox(image="fractal-sandbox:none"):
        pass


@pytest.mark.docker
@pytest.mark.parametrize("dropped", [{"network_mode": "bridge"}, {"read_only": False}, {"cap_add": ["SETUID", "SETGID", "KILL", "SYS_CHROOT"]}, {"security_opt": ["seccomp=unconfined"]}])  # fmt: skip
def test_a_dropped_protection_is_found_out(
    image: str, dropped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fractal.sandbox.host import container

    full = container.hardening
    monkeypatch.setattr(container, "hardening", lambda *a: {**full(*a), **dropped})
    with pytest.raises(SandboxError, match="not safe"), Sandbox(image=image):
        pass


def test_a_named_protection_may_be_missing_and_that_is_noted(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fractal.sandbox.host import container

    full = container.hardening
    monkeypatch.setattr(container, "hardening", lambda *a: {**full(*a), "read_only": False})
    with Sandbox(image=image, allow=["read_only_root", "writable"]) as sandbox:
        assert judge(sandbox, CORRECT).passed
        assert sandbox.checks["read_only_root"] == {**sandbox.checks["read_only_root"], "ok": False, "allowed": True}
    with pytest.raises(InputError, match="no such protection"), Sandbox(image=image, allow=["fire_wall"]):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("file", "count"), [("mbpp.jsonl", 974), ("sanitized-mbpp.json", 427)])
def test_every_reference_of_mbpp_passes(image: str, file: str, count: int) -> None:
    path = SHARED / "mbpp" / file
    if not path.exists():
        pytest.skip(f"no {path.name} beside the checkout: the product does not contain MBPP")
    problems = {p.task_id: p for p in read_problems(path)}
    samples = [sample(p.reference, task_id=p.task_id) for p in problems.values()]
    with Sandbox(image=image) as sandbox:
        labels = list(sandbox.verify(samples, problems))
    assert [(v.task_id, v.status, v.detail) for v in labels if not v.passed] == []
    assert len(labels) == count


def test_every_starter_reference_passes(sandbox: Sandbox) -> None:
    from fractal.problems.sets import STARTER

    problems = {p.task_id: p for p in read_problems(STARTER)}
    labels = sandbox.verify([sample(p.reference, task_id=p.task_id) for p in problems.values()], problems)
    assert [(v.task_id, v.status, v.detail) for v in labels if not v.passed] == []


@pytest.mark.slow
def test_real_samples_get_the_label_of_plain_evaluation(image: str) -> None:
    """1,889 real completions of Qwen2.5-Coder-0.5B against a fresh interpreter each."""
    import gzip
    from concurrent.futures import ThreadPoolExecutor

    from fractal.generate.prompts import extract_code

    path = SHARED / "generations" / "qwen2.5-coder-0.5b-mbpp.jsonl.gz"
    if not path.exists():
        pytest.skip("no real generations beside the checkout")
    problems = {p.task_id: p for p in read_problems(SHARED / "mbpp" / "sanitized-mbpp.json")}
    rows = [json.loads(line) for line in gzip.open(path)]
    samples = [
        sample(extract_code(r["completion"], problems[r["task_id"]].entry_point), r["sample_id"], r["task_id"])
        for r in rows
    ]
    with Sandbox(image=image) as sandbox:
        labels = list(sandbox.verify(samples, problems))

    def expected(one: Sample) -> bool:
        found = problems[one.task_id]
        try:
            return plain(one.code, found.tests, found.setup)
        except (subprocess.TimeoutExpired, ValueError, OSError):
            return False

    with ThreadPoolExecutor(2) as pool:
        plainly = list(pool.map(expected, samples))
    both = zip(samples, labels, plainly, strict=True)
    differing = [(one.task_id, one.sample_id, v.status, v.detail[:80]) for one, v, fine in both if fine != v.passed]
    assert differing == []
    assert len(labels) >= 1000


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own process"])
def test_recursion_goes_exactly_as_deep_as_in_plain_evaluation(sandbox: Sandbox, own: bool) -> None:
    code = "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\n" + ("class C: pass\n" if own else "")
    depths = range(990, 1003)
    problems = {n: problem([f"assert f({n}) == {n}"], task_id=n) for n in depths}
    found = [label.passed for label in sandbox.verify([sample(code, task_id=n) for n in depths], problems)]
    assert found == [plain(code, problems[n].tests) for n in depths]
    assert len(set(found)) == 2


@pytest.mark.parametrize(
    "error", ["TimeoutError", "MemoryError", "ConnectionResetError", "BrokenPipeError", "EOFError"]
)
def test_an_error_that_we_know_ourselves_is_the_programs_when_it_raises_it(sandbox: Sandbox, error: str) -> None:
    label = judge(sandbox, f"def f(x):\n    raise {error}('mine')\n")
    assert label.status == ("memory" if error == "MemoryError" else "error"), label


def test_the_reward_example_runs(image: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "docs/reward.py"], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [f"step {n}: [1.0, 0.0, 0.0]" for n in range(3)], done.stderr


@pytest.mark.docker
def test_own_processes_only(sandbox: Sandbox) -> None:
    """The sandbox's container runs as one container, with no mount of the host's."""
    attributes = docker.from_env().api.inspect_container(sandbox._line.container.id)
    assert attributes["Mounts"] == []
    assert attributes["HostConfig"]["Privileged"] is False
    assert os.getpid() > 0
