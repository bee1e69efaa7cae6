"""What a job's container runs first: it receives the secrets, waits for its turn, then becomes the job's command.

    python3 -c SOURCE '{"job": "train-1", "after": ["all-1"], "secrets": true}' COMMAND ...

It runs alone, as text, in any image with Python 3.9 or newer (containers.py), and imports the standard library only.

Secrets come as a JSON object into a tmpfs of the container, which another process there writes; the object is removed
when it was read. A turn is a lock on the job's own file in QUEUE, which the command inherits: the kernel releases it
when the last process of the job has ended, however it ended. A job waits for the lock of each job that was there before
it, so that jobs start in the order in which they were made.
"""

import fcntl
import json
import os
import signal
import sys
import time

SECRETS = "/run/secrets"  # a tmpfs that only the job's user reads
DELIVERED = f"{SECRETS}/delivered"
TOKEN = f"{SECRETS}/hf_token"
QUEUE = "/run/queue"
DELIVERY_TIMEOUT_S = 60.0
BEGIN_TIMEOUT_S = 60.0  # for a job that was started before this one to take its own lock


def receive_secrets() -> "dict[str, str]":
    """The environment variables that were delivered; the model hub's token becomes a file. Exits with 3 without."""
    deadline = time.monotonic() + DELIVERY_TIMEOUT_S
    while not os.path.exists(DELIVERED):
        if time.monotonic() > deadline:
            print(
                "The job's secrets did not arrive: the command that started it has ended. Start it again.", flush=True
            )
            sys.exit(3)
        time.sleep(0.02)
    with open(DELIVERED) as file:
        delivered = json.load(file)
    os.unlink(DELIVERED)
    if delivered["token"]:
        with open(os.open(TOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w") as file:
            file.write(delivered["token"])
    return dict(delivered["environment"])


def wait_for_turn(job: str, after: "list[str]") -> None:
    """Hold this job's lock from now on, and return when the jobs `after` have ended."""
    own = os.open(f"{QUEUE}/{job}", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(own, fcntl.LOCK_EX)
    os.write(own, b"begun")
    os.set_inheritable(own, True)
    for other in after:
        wait_for_end(other)


def wait_for_end(job: str) -> None:
    """Return when a job has released its lock, or its file was removed with the job."""
    deadline = time.monotonic() + BEGIN_TIMEOUT_S
    while True:
        try:
            file = os.open(f"{QUEUE}/{job}", os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the job {job} to end", flush=True)
            fcntl.flock(file, fcntl.LOCK_SH)
        began = os.fstat(file).st_size > 0
        os.close(file)
        if began or time.monotonic() > deadline:
            return
        time.sleep(0.1)  # it is still starting


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    settings, command = json.loads(sys.argv[1]), sys.argv[2:]
    if settings["secrets"]:
        os.environ.update(receive_secrets())
    if settings["after"] is not None:
        wait_for_turn(settings["job"], settings["after"])
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}: no program of the image.", file=sys.stderr, flush=True)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)  # as a shell says it


if __name__ == "__main__":
    main()
