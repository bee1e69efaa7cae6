"""The container's end that forks candidates: one zygote a slot, trusted, and it never sees a test.

It is started fresh (so nothing of the judge is in its memory), imports what programs commonly import, and then, for
each request of its judge, forks a candidate: a process of the slot's own uid with resource limits and a seccomp filter
of its own, in the slot's scratch folder. A shared candidate has another uid and no folder, so that a program in a
process of its own can neither signal nor limit it. Standard library only.
Run by judge.py: zygote.py CONTROL_FD SLOT_UID SHARED_UID FOLDER.
"""

import os
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))))

import base64
import ctypes
import gc
import json
import marshal
import platform
import random
import resource
import signal
import socket
import stat
import types
import warnings
from typing import Any

from fractal.sandbox.inside import packages
from fractal.sandbox.inside.candidate import CandidateEndpoint
from fractal.sandbox.inside.candidate_seccomp import FilterProgram, seccomp_filter
from fractal.sandbox.inside.protocol import CANDIDATE_THREADS, ConnectionClosedError, pack

PRELOAD = (
    "abc bisect cmath collections collections.abc copy dataclasses datetime decimal enum fractions functools heapq "
    "itertools json math numbers operator queue random re statistics string textwrap time typing unicodedata"
).split()
CHANNEL = 3  # a candidate's file descriptor
WARM_UP_RUNS = 30
COMMON_LIMITS = {
    "NOFILE": (64, 64),
    "NPROC": (CANDIDATE_THREADS, CANDIDATE_THREADS),
    "CORE": (0, 0),
    "MEMLOCK": (0, 0),
    "MSGQUEUE": (0, 0),
    "STACK": (8 << 20, 64 << 20),
}

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38


def main() -> tuple[CandidateEndpoint, bool]:
    """Fork when the judge asks. Returns in a child that became a candidate: its endpoint, and whether it is shared."""
    control = socket.socket(fileno=int(sys.argv[1]))
    uid, shared_uid, folder = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    libc = ctypes.PyDLL(None)
    text = ctypes.create_string_buffer(seccomp_filter(platform.machine()))
    program = ctypes.byref(FilterProgram(len(text.raw) // 8, ctypes.cast(text, ctypes.c_void_p)))
    installed = packages.installed()
    _prepare(installed.modules)
    endpoint = CandidateEndpoint(CHANNEL)
    while True:
        data, fds, _, _ = socket.recv_fds(control, 4096, 4)
        if not data:
            os._exit(0)
        request = json.loads(data)
        if request["do"] == "reap":
            control.send(_reap(request["pid"], request["wait"]))
            continue
        # Not os.fork(): its handlers of threading, random and the import system touch 160 pages more, which is half of
        # the cost. There is one thread, random is seeded already, and no candidate can fork.
        pid = libc.fork()
        if pid < 0:
            raise OSError("fork failed")
        if pid == 0 and request["do"] == "wipe":
            _wipe(uid, folder)
        if pid == 0:
            try:
                shared = request["shared"]
                place = (shared_uid, "/") if shared else (uid, folder)
                _become(request, fds, *place, libc, program, installed.address_space)
                return endpoint, shared
            except BaseException:
                sys.excepthook(*sys.exc_info())  # into the program's output
                os._exit(70)
        for fd in fds:
            os.close(fd)
        if request["do"] == "wipe":
            _, status = os.waitpid(pid, 0)
            control.send(json.dumps({"wiped": status == 0}).encode())
        else:
            control.send(json.dumps({"pid": pid}).encode())


def _prepare(modules: list[str]) -> None:
    """All that candidates have in common, done once: imports, limits, environment, and code that has run before."""
    for name in (*PRELOAD, *modules):
        __import__(name)
    for category in (SyntaxWarning, DeprecationWarning):  # compile() says them once per place: order would matter
        warnings.filterwarnings("ignore", category=category, module="<program>")
    for _ in range(WARM_UP_RUNS):
        _warm_up()
    for module in [name for name in sys.modules if name.startswith("fractal") or name == "__main__"]:
        del sys.modules[module]
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.path.pop(0)
    sys.argv = [""]
    for limit, most in COMMON_LIMITS.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), most)
        except ValueError:
            if limit != "MSGQUEUE":  # gVisor has no such limit; there are no queues: mq_open is forbidden
                raise
    threads = {name: value for name in packages.ONE_THREAD if (value := os.environ.get(name))}
    os.environ.clear()
    os.environ.update(threads, HOME="/", TMPDIR="/", PATH="/usr/bin:/bin", LANG="C.UTF-8", TZ="UTC")
    random.seed(0)  # same draws in every candidate: a label must not depend on what ran before
    if "numpy" in modules:
        sys.modules["numpy"].random.seed(0)
    gc.collect()
    gc.freeze()


def _warm_up() -> None:
    """A candidate's life on a harmless program: what the interpreter learns of its own code, children need not."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        code = base64.b64encode(marshal.dumps(compile("def f(x):\n    return [x]\n", "<program>", "exec"))).decode()
        ours.sendall(pack(["program", 1, "", code, [[], [], False], ["f"], False]))
        ours.sendall(pack(["q", "ahead", "f", [1], []]) + pack(["q", "call", {"o": 0}, [[1, "a"]], [], True]))
        ours.shutdown(socket.SHUT_WR)
        try:
            CandidateEndpoint(theirs.fileno()).live(shared=False)
        except ConnectionClosedError:
            pass


def _reap(pid: int, wait: bool) -> bytes:
    """How a candidate ended, as JSON; {} if it runs and shall not be waited for."""
    ended, status, usage = os.wait4(pid, 0 if wait else os.WNOHANG)
    if not ended:
        return b"{}"
    cpu_s = usage.ru_utime + usage.ru_stime
    return json.dumps({"exit": os.waitstatus_to_exitcode(status), "cpu_s": cpu_s}).encode()


def _become(
    limits: dict[str, Any], fds: list[int], uid: int, folder: str, libc: Any, program: Any, loaded: int
) -> None:
    """Turn this fresh fork into a candidate: descriptors, limits, uid and system calls. Fails closed."""
    channel, output, *script = fds
    os.dup2(output, 1)  # 0 is /dev/null already
    os.dup2(output, 2)
    if script:  # its standard input, and a pipe of its own for what it prints
        os.dup2(script[0], 0)
        os.dup2(script[1], 1)
    os.dup2(channel, CHANNEL)
    os.closerange(CHANNEL + 1, 1024)
    memory, largest = (limits["memory_mib"] << 20) + loaded, limits["file_mib"] << 20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    if not limits["shared"]:  # its CPU time is that of many programs: the judge looks at each
        cpu_s = int(limits["cpu_s"]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.chdir(folder)
    os.environ["HOME"] = os.environ["TMPDIR"] = folder
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # here: a change of uid clears it
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0):
        os._exit(70)


def _wipe(uid: int, folder: str) -> None:
    """Empty the folder, as the owner of what is in it; exits 0 when it is empty.

    Step by step, down and up again: a program may have nested folders deeper than any path is long.
    """
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        os.chdir(folder)
        depth = 0
        while True:
            below = None
            for name in os.listdir("."):
                if stat.S_ISDIR(os.lstat(name).st_mode):
                    below = name
                else:
                    os.unlink(name)
            if below is None and depth == 0:
                os._exit(0)
            if below is None:
                os.chdir("..")
                depth -= 1
                continue
            os.chmod(below, 0o700)
            try:
                os.rmdir(below)
            except OSError:
                os.chdir(below)
                depth += 1
    finally:
        os._exit(1)


if __name__ == "__main__":
    ENDPOINT, SHARED = main()
    try:  # not inside a function: a program has as many frames below it as in plain evaluation (tests/test_sandbox.py)
        ENDPOINT.live(SHARED)
    except (ConnectionClosedError, BrokenPipeError):
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(70)
