"""One ssh connection that many commands share, by OpenSSH's own client, config and agent; no password is asked for.

The connection lives as long as a script on the far side, the keeper. Its input ends when we end: a SIGKILL here closes
the pipe to ssh, and a network that is gone stops the heartbeats. So the keeper can undo what was begun there, whatever
became of us. Knows nothing of Docker.
"""

import contextlib
import re
import select
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fractal.errors import InputError, OutsideError

CONNECT_TIMEOUT_S = 15  # of TCP; the rest of the way in gets READY_TIMEOUT_S
READY_TIMEOUT_S = 60.0
END_TIMEOUT_S = 20.0  # for the keeper to clean up; `docker rm -f` of a small container takes about one
RUN_TIMEOUT_S = 60.0
BEAT_S = 10.0
SILENCE_S = 60  # without a beat the keeper ends. A suspended laptop loses its connection, not the far side's order
BEGINS = "fractal-begins"  # what a login shell says before is no answer
# The user's config may ask for things that suit a person at a terminal: not for us.
OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": str(CONNECT_TIMEOUT_S),
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "4",
    "ControlMaster": "yes",
    "ControlPersist": "no",
    "ClearAllForwardings": "yes",
    "ExitOnForwardFailure": "yes",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
}
BEATS = f'while beat=$(timeout {SILENCE_S} head -c 1) && [ -n "$beat" ]; do :; done'  # a keeper's last line


class SshError(OutsideError):
    """The far side cannot be reached by ssh, or not as we need it: one line with the remedy."""


class SshKeyChanged(SshError):
    """Another host key than the one that is known."""


class SshLost(SshError):
    """It cannot be reached now, or no longer; a moment later it may be."""


class Link:
    """A connection to `host`, an OpenSSH destination. `config` stands in for ~/.ssh/config.

    Raises InputError, SshError, SshLost.
    """

    def __init__(self, host: str, keeper: str, config: Path | None = None) -> None:
        """Connect, and start the keeper: POSIX sh, which reads the lines that `tell` sends and closes with BEATS."""
        if not host or host.startswith("-") or any(char.isspace() or not char.isprintable() for char in host):
            raise InputError(f"{host!r} is no ssh destination. Give an alias of your ssh config, or user@host.")
        self.host = host
        # A socket's name has 104 bytes at most, and TMPDIR may be long.
        self._folder = Path(tempfile.mkdtemp(prefix="fractal-ssh-", dir="/tmp"))
        self._socket = self._folder / "s"
        self._ended = threading.Event()
        self._buffer = b""
        argv = ["ssh", "-T", "-x", *(["-F", str(config)] if config else []), "-S", str(self._socket)]
        argv += [f"-o{name}={value}" for name, value in OPTIONS.items()]
        try:
            with (self._folder / "log").open("wb") as log:
                self._master = subprocess.Popen(
                    [*argv, "--", host, remote(keeper)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,
                    start_new_session=True,  # a Ctrl-C reaches us, and we end it in order
                )
        except FileNotFoundError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise SshError("There is no ssh here. On Debian or Ubuntu run: apt-get install openssh-client.") from error
        try:
            self.hear(BEGINS, READY_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def check(self) -> None:
        """Raises SshLost with ssh's last words if the connection is gone."""
        if self._master.poll() is not None:
            raise self._lost()

    def hear(self, word: str, timeout_s: float) -> str:
        """What follows this word on the keeper's next line that begins with it."""
        deadline = time.monotonic() + timeout_s
        out = self._master.stdout
        assert out is not None
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                text = line.decode(errors="replace")
                if text.split(" ")[0] == word:
                    return text.removeprefix(word).strip()
                continue
            if not select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise SshLost(f"{self.host} does not answer within {timeout_s:.0f} s. Try: ssh {self.host} true")
            data = out.read(4096)
            if not data:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._master.wait(5)
                raise self._lost()
            self._buffer += data

    def tell(self, *lines: str) -> None:
        """Send lines to the keeper, once; heartbeats follow until the end."""
        self._write("".join(f"{line}\n" for line in lines).encode())
        threading.Thread(target=self._beat, name=f"beat {self.host}", daemon=True).start()

    def run(
        self, script: str, *words: str, stdin: IO[bytes] | None = None, timeout_s: float = RUN_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """A POSIX sh script with arguments, on the far side, over this connection; its exit code and output."""
        argv = [*self._client(), "--", self.host, remote(script, *words)]
        try:
            done = subprocess.run(
                argv,
                stdin=stdin or subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            self.check()
            raise SshLost(
                f"{self.host}: no end after {timeout_s:.0f} s of: {script.split()[0]}. Look there."
            ) from error
        _, begun, done.stdout = done.stdout.partition(f"{BEGINS}\n")
        if done.returncode == 255:  # ssh's own failure, or the script's
            time.sleep(0.2)
            self.check()
        if not begun:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200].rstrip(". ")
            raise SshError(
                f"{self.host} lets us in, but runs nothing more on the same connection: {last}. "
                "Look at MaxSessions in its sshd_config, and at its login shell."
            )
        return done

    def stream(self, script: str, *words: str) -> subprocess.Popen[bytes]:
        """A script whose output is read as it comes; standard error is part of it. The reader waits for its end.

        Raises SshLost if it does not begin.
        """
        process = subprocess.Popen(
            [*self._client(), "--", self.host, remote(f"exec 2>&1\n{script}", *words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        assert process.stdout is not None
        line = b""
        while line != f"{BEGINS}\n".encode():
            byte = process.stdout.read(1)
            if not byte:
                process.wait()
                self.check()
                raise SshLost(f"{self.host} runs nothing more on this connection. Try: ssh {self.host} true")
            line = byte if line.endswith(b"\n") else line + byte
        return process

    @property
    def shell(self) -> str:
        """This connection as rsync's --rsh."""
        return shlex.join(self._client())

    def forward(self, here: int, there: int) -> bool:
        """Whether our loopback's port `here` now leads to the far loopback's `there`; no if it is taken."""
        return self._forward(f"127.0.0.1:{here}:127.0.0.1:{there}")

    def forward_socket(self, here: Path, there: str) -> bool:
        """Whether the Unix socket `here`, made now, leads to `there`, which the far user has to be allowed to open."""
        return self._forward(f"{here}:{there}")

    def _forward(self, ways: str) -> bool:
        argv = [*self._client(), "-O", "forward", "-L", ways, "--", self.host]
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise SshLost(f"{self.host}: no tunnel within {RUN_TIMEOUT_S:.0f} s. Try: ssh {self.host} true") from error
        self.check()
        return done.returncode == 0

    def close(self) -> None:
        """End the keeper's input and wait for it; the folder goes."""
        self._ended.set()
        try:
            if self._master.stdin:
                with contextlib.suppress(OSError):
                    self._master.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._master.wait(END_TIMEOUT_S)
        finally:
            if self._master.poll() is None:
                self._master.kill()
                self._master.wait()
            if self._master.stdout:
                self._master.stdout.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _client(self) -> list[str]:
        """A client of the shared connection, blind to the user's config; without the socket it fails at once."""
        return ["ssh", "-T", "-x", "-F", "none", "-S", str(self._socket), "-oBatchMode=yes", "-oProxyCommand=false"]

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self._write(b".")
            except (OSError, ValueError, SshError):
                return

    def _write(self, data: bytes) -> None:
        assert self._master.stdin is not None
        try:
            self._master.stdin.write(data)
        except BrokenPipeError as error:
            raise self._lost() from error

    def _lost(self) -> SshError:
        try:
            words = (self._folder / "log").read_text(errors="replace")
        except FileNotFoundError:  # closed meanwhile, by a thread that makes another connection
            words = "closed"
        return explain(self.host, words)


def remote(script: str, *words: str) -> str:
    """A POSIX sh script as the command line that any login shell takes; it says BEGINS first."""
    return shlex.join(["exec", "sh", "-c", f"echo {BEGINS}\n{script}", "sh", *words])


def explain(host: str, words: str) -> SshError:
    """ssh's last words as one line with the remedy. OpenSSH 9.2's wording."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    last = re.sub(r"\s+", " ", lines[-1])[:200].rstrip(".") if lines else "ssh ended without a word"
    by_hand = f"ssh {host} true"
    if "IDENTIFICATION HAS CHANGED" in words:
        return SshKeyChanged(
            f"The host key of {host} is not the one in your known_hosts: another machine has this address, or someone "
            f"is in between. If you replaced the machine, remove the old key (ssh-keygen -R ADDRESS); try: {by_hand}"
        )
    if "Host key verification failed" in words:
        return SshError(f"The host key of {host} is not known here. Connect once and confirm it: {by_hand}")
    if "Permission denied" in words or "Too many authentication failures" in words:
        return SshError(
            f"{host} does not let us in: {last}. No password can be typed here: name the key in your ssh config, or "
            f"ssh-add it; then try: {by_hand}"
        )
    if "Bad configuration option" in words or "bad configuration" in words or "Can't open user config" in words:
        return SshError(f"ssh rejects its configuration: {last}. Correct it; then try: {by_hand}")
    if "Could not resolve hostname" in words:
        return SshLost(f"No machine is known as {host}: {last}. Check the name, or add the alias to your ssh config.")
    if "Connection refused" in words:
        return SshLost(f"{host} is there, but nothing listens: {last}. Is it still booting? Try: {by_hand}")
    if re.search(r"Connection timed out|No route to host|Network is unreachable|Operation timed out", words):
        return SshLost(f"{host} does not answer: {last}. Is it running, and its firewall open for ssh? Try: {by_hand}")
    return SshLost(f"The ssh connection to {host} ended: {last}. Try: {by_hand}")
