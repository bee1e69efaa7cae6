"""The spacing of requests that Lambda's API demands, shared by all processes that use one state folder."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from filelock import FileLock

REQUEST_INTERVAL_S = 1.05  # Lambda allows 1 request/s, counted on arrival: leave room for network jitter
LAUNCH_INTERVAL_S = 12.5  # Lambda allows 1 launch in 12 s
LOG_AFTER_S = 3.0  # a longer wait is logged

Kind = Literal["request", "launch"]


class RateLimiter:
    """Keeps requests apart, in all threads and processes that share a folder.

    The time of the last request is a file's modification time: the file has no content that could break, and no clock
    change can make anyone wait longer than one interval. The waiting process holds a lock that the kernel releases if
    the process dies.
    """

    def __init__(
        self, folder: Path, *, request_s: float = REQUEST_INTERVAL_S, launch_s: float = LAUNCH_INTERVAL_S
    ) -> None:
        self._folder = folder
        self._interval_s: dict[Kind, float] = {"request": request_s, "launch": launch_s}

    def wait(self, kind: Kind, log: Callable[[str], None] | None = None) -> None:
        """Return when the next request of this kind may be sent."""
        interval_s, stamp = self._interval_s[kind], self._folder / f"last-{kind}"
        if interval_s == 0:
            return
        lock = FileLock(
            f"{stamp}.lock",
            timeout=20 * interval_s + 5,  # a long queue; who gives up gets HTTP 429 and retries
            poll_interval=0.02,
            fallback_to_soft=False,  # a soft lock would outlive a killed holder
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with lock:
                last = stamp.stat().st_mtime if stamp.exists() else 0.0
                delay_s = min(interval_s, last + interval_s - time.time())  # clocks jump
                if log is not None and delay_s > LOG_AFTER_S:
                    log(f"Lambda allows one {kind} in {interval_s:.0f} s: the next is sent in {delay_s:.0f} s.")
                time.sleep(max(0.0, delay_s))
                stamp.touch()
        except (OSError, NotImplementedError):  # an instance must be terminated on a full disk, too
            time.sleep(interval_s)
