"""One SSH connection that many commands share, by OpenSSH's own client, configuration and agent, without passwords.

    with SshConnection("lambda", WAIT_FOR_HEARTBEATS) as connection:
        connection.send_lines()
        print(connection.run("uname -m").stdout)

The connection lives as long as its session script on the remote host. The script's input ends when this process ends:
a SIGKILL closes the pipe to ssh, and without a network the heartbeats stop. So the script can clean up on the remote
host, whatever happened here."""

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

CONNECT_TIMEOUT_S = 15  # of TCP; authentication and the rest get READY_TIMEOUT_S
READY_TIMEOUT_S = 60.0
END_TIMEOUT_S = 20.0  # for the session script to clean up; `docker rm -f` of a small container takes about one
RUN_TIMEOUT_S = 60.0
HEARTBEAT_S = 10.0
HEARTBEAT_TIMEOUT_S = 60  # without a heartbeat the session script ends
START_MARKER = "fractal-begins"  # output of a login shell before this line is ignored
# The user's configuration may hold options that suit a person at a terminal.
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
# The last line of a session script.
WAIT_FOR_HEARTBEATS = f'while beat=$(timeout {HEARTBEAT_TIMEOUT_S} head -c 1) && [ -n "$beat" ]; do :; done'


class SshError(OutsideError):
    """The host cannot be used over SSH: one line with the remedy."""


class SshHostKeyError(SshError):
    """The host key is not the one in known_hosts."""


class SshConnectionError(SshError):
    """There is no connection, or it was lost; a later attempt may succeed."""


class SshConnection:
    """A connection to `host`, an OpenSSH destination. `config` is used instead of ~/.ssh/config.

    Raises InputError, SshError, SshConnectionError.
    """

    def __init__(self, host: str, session_script: str, *arguments: str, config: Path | None = None) -> None:
        """Connect and start the session script (POSIX sh): it reads `send_lines`' lines, then waits for heartbeats."""
        if not host or host.startswith("-") or any(char.isspace() or not char.isprintable() for char in host):
            raise InputError(f"{host!r} is no ssh destination. Give an alias of your ssh config, or user@host.")
        self.host = host
        # The name of a socket has 104 bytes at most, and TMPDIR may be long.
        self._folder = Path(tempfile.mkdtemp(prefix="fractal-ssh-", dir="/tmp"))
        self._socket = self._folder / "s"
        self._ended = threading.Event()
        self._buffer = b""
        argv = ["ssh", "-T", "-x", *(["-F", str(config)] if config else []), "-S", str(self._socket)]
        argv += [f"-o{name}={value}" for name, value in OPTIONS.items()]
        try:
            with (self._folder / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [*argv, "--", host, remote_command(session_script, *arguments)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,
                    start_new_session=True,  # Ctrl-C reaches this process, which closes the connection in order
                )
        except FileNotFoundError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise SshError("There is no ssh here. On Debian or Ubuntu run: apt-get install openssh-client.") from error
        try:
            self.read_reply(START_MARKER, READY_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def check_alive(self) -> None:
        """Raise SshConnectionError with ssh's last output if the connection is gone."""
        if self._process.poll() is not None:
            raise self._lost_error()

    def read_reply(self, prefix: str, timeout_s: float) -> str:
        """The rest of the session script's next line of output that begins with the word `prefix`."""
        deadline = time.monotonic() + timeout_s
        out = self._process.stdout
        assert out is not None
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                text = line.decode(errors="replace")
                if text.split(" ")[0] == prefix:
                    return text.removeprefix(prefix).strip()
                continue
            if not select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise SshConnectionError(
                    f"{self.host} does not answer within {timeout_s:.0f} s. Try: ssh {self.host} true"
                )
            data = out.read(4096)
            if not data:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(5)
                raise self._lost_error()
            self._buffer += data

    def send_lines(self, *lines: str) -> None:
        """Send lines to the session script, once; heartbeats follow until the connection is closed."""
        self._write("".join(f"{line}\n" for line in lines).encode())
        threading.Thread(target=self._send_heartbeats, name=f"heartbeats {self.host}", daemon=True).start()

    def run(
        self, script: str, *arguments: str, stdin: IO[bytes] | None = None, timeout_s: float = RUN_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a POSIX sh script on the host over this connection; returns its exit code and output."""
        argv = [*self._shared_client(), "--", self.host, remote_command(script, *arguments)]
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
            self.check_alive()
            first = next(line for line in script.splitlines() if line and not line.startswith("#"))
            raise SshConnectionError(
                f"{self.host}: no end after {timeout_s:.0f} s of: {first[:60]}. Look there."
            ) from error
        _, started, done.stdout = done.stdout.partition(f"{START_MARKER}\n")
        if done.returncode == 255:  # ssh's own failure, or the script's
            time.sleep(0.2)
            self.check_alive()
        if not started:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200].rstrip(". ")
            raise SshError(
                f"{self.host} lets us in, but runs nothing more on the same connection: {last}. "
                "Look at MaxSessions in its sshd_config, and at its login shell."
            )
        return done

    def stream(self, script: str, *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Run a script whose output, standard error included, is read as it comes. The caller waits for its end.

        `stdin`: PIPE if the caller writes its input. Raises SshConnectionError if it does not start.
        """
        process = subprocess.Popen(
            [*self._shared_client(), "--", self.host, remote_command(f"exec 2>&1\n{script}", *arguments)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        assert process.stdout is not None
        line = b""
        while line != f"{START_MARKER}\n".encode():
            byte = process.stdout.read(1)
            if not byte:
                process.wait()
                self.check_alive()
                raise SshConnectionError(f"{self.host} runs nothing more on this connection. Try: ssh {self.host} true")
            line = byte if line.endswith(b"\n") else line + byte
        return process

    @property
    def rsync_shell(self) -> str:
        """This connection as rsync's --rsh."""
        return shlex.join(self._shared_client())

    def forward_port(self, local_port: int, remote_port: int) -> bool:
        """Forward a port of this machine's loopback to the host's loopback; False if the local port is taken."""
        return self._forward(f"127.0.0.1:{local_port}:127.0.0.1:{remote_port}")

    def forward_socket(self, local: Path, remote: str) -> bool:
        """Forward a new Unix socket to one on the host, which the remote user has to be allowed to open."""
        return self._forward(f"{local}:{remote}")

    def _forward(self, specification: str) -> bool:
        argv = [*self._shared_client(), "-O", "forward", "-L", specification, "--", self.host]
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise SshConnectionError(
                f"{self.host}: no tunnel within {RUN_TIMEOUT_S:.0f} s. Try: ssh {self.host} true"
            ) from error
        self.check_alive()
        return done.returncode == 0

    def close(self) -> None:
        """End the session script's input, wait for its end, and remove the temporary folder."""
        self._ended.set()
        try:
            if self._process.stdin:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT_S)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            if self._process.stdout:
                self._process.stdout.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _shared_client(self) -> list[str]:
        """A client of the shared connection, without the user's configuration; without the socket it fails at once."""
        return ["ssh", "-T", "-x", "-F", "none", "-S", str(self._socket), "-oBatchMode=yes", "-oProxyCommand=false"]

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                self._write(b".")
            except (OSError, ValueError, SshError):
                return

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
        except BrokenPipeError as error:
            raise self._lost_error() from error

    def _lost_error(self) -> SshError:
        try:
            output = (self._folder / "log").read_text(errors="replace")
        except FileNotFoundError:  # closed meanwhile, by a thread that makes another connection
            output = "closed"
        return error_from_output(self.host, output)


def remote_command(script: str, *arguments: str) -> str:
    """A POSIX sh script as a command line that any login shell takes; it prints START_MARKER first."""
    return shlex.join(["exec", "sh", "-c", f"echo {START_MARKER}\n{script}", "sh", *arguments])


# What ssh prints (OpenSSH 9.2) -> the error and its message. The first pattern that occurs decides.
ERRORS: tuple[tuple[str, type[SshError], str], ...] = (
    ("IDENTIFICATION HAS CHANGED", SshHostKeyError,
     "The host key of {host} is not the one in your known_hosts: another machine has this address, or someone is in "
     "between. If you replaced the machine, remove the old key (ssh-keygen -R ADDRESS); try: ssh {host} true"),
    ("Host key verification failed", SshError,
     "The host key of {host} is not known here. Connect once and confirm it: ssh {host} true"),
    ("Permission denied|Too many authentication failures", SshError,
     "{host} does not let us in: {last}. No password can be typed here: name the key in your ssh config, or ssh-add "
     "it; then try: ssh {host} true"),
    ("Bad configuration option|bad configuration|Can't open user config", SshError,
     "ssh rejects its configuration: {last}. Correct it; then try: ssh {host} true"),
    ("Could not resolve hostname", SshConnectionError,
     "No machine is known as {host}: {last}. Check the name, or add the alias to your ssh config."),
    ("Connection refused", SshConnectionError,
     "{host} is there, but nothing listens: {last}. Is it still booting? Try: ssh {host} true"),
    ("Connection timed out|No route to host|Network is unreachable|Operation timed out", SshConnectionError,
     "{host} does not answer: {last}. Is it running, and its firewall open for ssh? Try: ssh {host} true"),
    ("", SshConnectionError, "The ssh connection to {host} ended: {last}. Try: ssh {host} true"),
)  # fmt: skip


def error_from_output(host: str, output: str) -> SshError:
    """The error that ssh's last output stands for."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = re.sub(r"\s+", " ", lines[-1])[:200].rstrip(".") if lines else "ssh ended without a word"
    kind, message = next((kind, message) for pattern, kind, message in ERRORS if re.search(pattern, output))
    return kind(message.format(host=host, last=last))
