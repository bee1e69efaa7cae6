"""A judge's handle on its zygote and on the processes that run programs: their limits, output and ends.

Trusted, in the judge. Standard library only.
"""

import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

from fractal.sandbox.inside.proxy import CandidateEndedError, Channel, JudgeEndpoint

OUTPUT_KEPT = 2000  # bytes of a program's output
AFTER_FAILURE_CPU_S = 0.25  # what the tests after the first that failed may take: they no longer decide
AFTER_CALL_CPU_S = 0.01  # the calls under way tell nothing: their end is waited for where that is cheaper than a fork
AFTER_FAILURE_WALL_S = 2.0
CPUCLOCK_SCHED = 2


class Slot:
    """A judge's own zygote, scratch folder and uids."""

    def __init__(self, uid: int, shared_uid: int, scratch: str) -> None:
        self.uid, self.shared_uid, self.scratch = uid, shared_uid, scratch
        # Programs run in a folder that is root's, open to them, below one that only this slot's group may enter: none
        # of them can close it, or leave a mark on it for the next.
        self.folder = f"{scratch}/w"
        os.makedirs(self.folder, exist_ok=True)
        os.chmod(self.folder, 0o1777)
        state = os.statvfs(scratch)
        self._files, self._blocks = state.f_files - state.f_ffree, state.f_blocks - state.f_bfree
        self._control: socket.socket | None = None
        self._zygote = 0  # its process id; 0: none

    def control(self) -> socket.socket:
        """The line to a living zygote; a fresh one is started where there is none."""
        if self._control is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "zygote.py")
            numbers = [str(n) for n in (theirs.fileno(), self.uid, self.shared_uid)]
            command = [sys.executable, "-s", "-P", "-B", here, *numbers, self.folder]
            theirs.set_inheritable(True)  # this one alone beside 0, 1 and 2
            self._zygote = os.posix_spawn(sys.executable, command, os.environ)
            theirs.close()
            self._control = ours
        return self._control

    def end_zygote(self) -> None:
        """End the zygote (its candidates die with it); the next sample gets a fresh one."""
        if self._zygote:
            os.kill(self._zygote, signal.SIGKILL)
            os.waitpid(self._zygote, 0)
        if self._control is not None:
            self._control.close()
        self._zygote, self._control = 0, None

    def request(self, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        control = self.control()
        socket.send_fds(control, [json.dumps(message).encode()], fds)
        data = control.recv(4096)
        if not data:
            raise ConnectionError("the zygote is gone")
        answer: dict[str, Any] = json.loads(data)
        return answer

    def is_used(self) -> bool:
        """Whether a program may have left anything in its folder, which has a file system of its own."""
        state = os.statvfs(self.scratch)
        files, blocks = state.f_files - state.f_ffree, state.f_blocks - state.f_bfree
        return state.f_files == 0 or files > self._files or blocks > self._blocks  # gVisor counts no files


def cpu_clock(pid: int) -> int:
    """The number of a process's CPU clock, for clock_gettime: what clock_getcpuclockid(3) computes on Linux.

    The kernel's posix-timers.h: the complement of the process id above three bits, of which the value 2 names the
    clock of user and system time (CPUCLOCK_SCHED).
    """
    return (~pid << 3) | CPUCLOCK_SCHED


class ScriptFiles:
    """What a script reads from standard input, and the pipe for what it prints."""

    def __init__(self, text: str, most: int) -> None:
        self.most = most  # bytes of output that are kept
        self.output = bytearray()
        self.overflow = False  # it printed more than that
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        memory = os.memfd_create("stdin")
        try:
            with open(memory, "wb", closefd=False) as file:
                file.write(text.encode("utf-8", "surrogatepass"))
            self.stdin = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
        finally:
            os.close(memory)

    def drain(self) -> bytes | None:
        """Take what has been printed; None where there is nothing to read, b"" where there never will be."""
        try:
            data = os.read(self.reader, 1 << 18)
        except BlockingIOError:
            return None
        if len(self.output) + len(data) > self.most:
            self.overflow = True
        else:
            self.output += data
        return data

    def handed_over(self) -> None:
        """The script's process has its ends, so they are closed here: its end shows in the pipe."""
        os.close(self.writer)
        os.close(self.stdin)
        self.writer = self.stdin = -1

    def close(self) -> None:
        for fd in (self.reader, self.writer, self.stdin):
            if fd >= 0:
                os.close(fd)


class CandidateProcess:
    """A process that runs programs, as its judge sees it; with `script`, a script that has these files for its own."""

    def __init__(self, slot: Slot, limits: dict[str, Any], shared: bool, script: ScriptFiles | None = None) -> None:
        self._slot = slot
        self.shared = shared
        self.memory_mib = limits["memory_mib"]
        self.programs = 0
        ours, theirs = socket.socketpair()
        reader, writer = os.pipe()
        try:
            fds = [theirs.fileno(), writer, *([script.stdin, script.writer] if script else [])]
            self.pid: int = slot.request({"do": "fork", "shared": shared, **limits}, fds)["pid"]
        except BaseException:
            ours.close()
            os.close(reader)
            raise
        finally:
            theirs.close()
            os.close(writer)
        if script is not None:
            script.handed_over()
        os.set_blocking(reader, False)
        self.channel = Channel(ours)
        self.output = reader
        self.poll = select.poll()
        self.poll.register(ours, select.POLLIN)
        self.poll.register(reader, select.POLLIN)
        self.script = script
        if script is not None:
            self.poll.register(script.reader, select.POLLIN)
        self.exit: dict[str, Any] = {}

    def cpu_s(self) -> float:
        """CPU time so far, from the process's own clock; 0 when it has ended."""
        try:
            return time.clock_gettime(cpu_clock(self.pid))
        except OSError:
            return 0.0

    def ended(self, wait: bool) -> bool:
        """Whether it is gone, and reaped; `wait` for what is sure to end."""
        if not self.exit:
            self.exit = self._slot.request({"do": "reap", "pid": self.pid, "wait": wait}, [])
        return bool(self.exit)

    def end(self) -> None:
        """Kill it, wait until it is gone, and free what it held."""
        try:
            if not self.exit:
                os.kill(self.pid, signal.SIGKILL)
                self.ended(wait=True)
        finally:
            self.channel.sock.close()
            os.close(self.output)


class ProgramRun:
    """One program in a candidate process: its limits, its output, and how it ended."""

    def __init__(self, candidate: CandidateProcess, cpu_limit_s: float, wall_limit_s: float, deadline: float) -> None:
        self._candidate = candidate
        self.shared = candidate.shared
        self._cpu_limit_s = cpu_limit_s
        self._wall_limit_s = wall_limit_s
        self._deadline = deadline
        self._cpu_before = candidate.cpu_s()
        self.ended: str | None = None  # "timeout", "memory", "crashed", "forbidden": why it can answer no more
        self.detail = ""
        self.limit = ""  # which limit a timeout means: "cpu" or "wall"
        self.output = b""
        self.plain = True  # no value was too odd for a process that is shared
        candidate.channel.sock.settimeout(max(0.05, deadline - time.monotonic()))
        self.fit = False  # whether sharing.py found nothing against the program
        self.endpoint = JudgeEndpoint(candidate.channel, self.wait, self.stuck)

    def wait(self, closed: bool) -> None:
        """Return when the candidate has sent something. Raises CandidateEndedError at its end, or at a limit.

        CPU time decides; wall time is for programs that sleep. `closed`: it hung up; its end, or a limit, is awaited.
        """
        candidate, pause_s = self._candidate, 0.0005
        if self.ended:
            raise CandidateEndedError
        while True:
            if closed and candidate.ended(wait=False):
                self._died(candidate.exit)
                raise CandidateEndedError
            now = time.monotonic()
            used = self.cpu_s()
            if used > self._cpu_limit_s:
                self._stop("cpu", f"CPU time over {self._cpu_limit_s:g} s")
            if now > self._deadline:
                self._stop("wall", f"wall time over {self._wall_limit_s:g} s after {used:.2f} s of CPU")
            if closed:
                if candidate.script is not None and candidate.script.drain():
                    if candidate.script.overflow:
                        return
                    continue
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.05)
                continue
            longest = min(self._deadline - now, max(self._cpu_limit_s - used, 0.01)) + 0.005
            ready = candidate.poll.poll(longest * 1000)
            readable = [fd for fd, _ in ready]
            if candidate.output in readable and self.drain() == b"":
                candidate.poll.unregister(candidate.output)  # it closed its output
            if candidate.script is not None and candidate.script.reader in readable:
                if candidate.script.drain() == b"":
                    candidate.poll.unregister(candidate.script.reader)
                elif candidate.script.overflow:
                    return
            if candidate.channel.sock.fileno() in readable:
                return

    def finish_script(self) -> None:
        """Return when the script has ended, or has to be ended.

        The channel becomes readable when it ends; or when it writes there, which is of no interest.
        """
        script = self._candidate.script
        assert script is not None
        try:
            self.wait(False)
            if not script.overflow:
                self.wait(True)
        except CandidateEndedError:
            pass
        while not script.overflow and script.drain():
            pass
        while self.drain():
            pass

    @property
    def exit_code(self) -> int | None:
        """How the process ended: its code, or minus a signal; None where it had to be ended."""
        code: int | None = self._candidate.exit.get("exit") if not self.limit else None
        return code

    def decided(self, more_cpu_s: float) -> None:
        """A test has failed: what else is under way gets a little more time."""
        self._cpu_limit_s = self.cpu_s() + more_cpu_s
        self._deadline = time.monotonic() + AFTER_FAILURE_WALL_S

    def stuck(self) -> None:
        self._stop("wall", "the program does not read what it is sent")

    def cpu_s(self) -> float:
        if self._candidate.exit:
            used: float = self._candidate.exit["cpu_s"]
            return used - self._cpu_before
        return max(0.0, self._candidate.cpu_s() - self._cpu_before)

    def drain(self) -> bytes | None:
        """Take what the program has printed; None where there is nothing to read, b"" where there never will be."""
        try:
            data = os.read(self._candidate.output, 1 << 16)
        except BlockingIOError:
            return None
        if len(self.output) < OUTPUT_KEPT:
            self.output = (self.output + data)[:OUTPUT_KEPT]
        return data

    def _stop(self, limit: str, detail: str) -> None:
        self.ended, self.limit, self.detail = "timeout", limit, detail
        raise CandidateEndedError

    def _died(self, record: dict[str, Any]) -> None:
        code = record["exit"]
        if code in (-signal.SIGXCPU,) or (code == -signal.SIGKILL and self.cpu_s() >= self._cpu_limit_s):
            self.ended, self.limit, self.detail = "timeout", "cpu", f"CPU time over {self._cpu_limit_s:g} s"
        elif code == -signal.SIGSYS:
            self.ended, self.detail = "forbidden", "a system call that the sandbox forbids (SIGSYS)"
        elif code == -signal.SIGKILL:
            self.ended, self.detail = "memory", "killed by the kernel, as when memory runs out (SIGKILL)"
        elif code < 0:
            self.ended, self.detail = "crashed", f"died by {_signal_name(-code)}"
        else:
            self.ended, self.detail = "crashed", f"left with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
