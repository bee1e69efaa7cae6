"""The spacing of requests that Lambda's API demands, shared by all processes that use one state folder."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock

REQUEST_INTERVAL_S = 1.05  # Lambda allows 1 request/s, counted on arrival: leave room for network jitter
LAUNCH_INTERVAL_S = 12.5  # Lambda allows 1 launch in 12 s
LOG_AFTER_S = 3.0  # a longer wait is logged

Kind = Literal["request", "launch"]


class RateLimiter:
    """Keeps requests apart, in all processes that share a folder; without a folder, in this process.

    The time of the last request is a file's modification time: the file has no content that could break, and no clock
    change can make anyone wait longer than one interval. The waiting process holds a lock that the kernel releases if
    the process dies.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        request_s: float = REQUEST_INTERVAL_S,
        launch_s: float = LAUNCH_INTERVAL_S,
    ) -> None:
        self._folder = folder
        self._interval_s: dict[Kind, float] = {"request": request_s, "launch": launch_s}
        self._last: dict[Kind, float] = {}  # by this process's monotonic clock
        self._locks: dict[Kind, threading.Lock] = {"request": threading.Lock(), "launch": threading.Lock()}

    def wait(self, kind: Kind, log: Callable[[str], None] | None = None) -> None:
        """Return when the next request of this kind may be sent."""
        interval_s = self._interval_s[kind]
        with self._locks[kind], self._shared_stamp(kind) as stamp:
            delay_s = interval_s - (time.monotonic() - self._last[kind]) if kind in self._last else 0.0
            if stamp is not None:
                delay_s = max(delay_s, interval_s - _age_s(stamp))
            delay_s = min(delay_s, interval_s)  # clocks jump
            if delay_s > 0:
                if log is not None and delay_s > LOG_AFTER_S:
                    log(f"Lambda allows one {kind} in {interval_s:.0f} s: the next is sent in {delay_s:.0f} s.")
                time.sleep(delay_s)
            self._last[kind] = time.monotonic()
            if stamp is not None:
                with contextlib.suppress(OSError):
                    stamp.touch()
                    os.utime(stamp)

    @contextmanager
    def _shared_stamp(self, kind: Kind) -> Iterator[Path | None]:
        """The stamp file, with its lock held; None where it cannot be locked.

        An instance must be terminated on a full disk, too.
        """
        if self._folder is None:
            yield None
            return
        lock = FileLock(
            self._folder / f"last-{kind}.lock",
            timeout=20 * self._interval_s[kind] + 5,  # a long queue; who gives up gets HTTP 429 and retries
            poll_interval=0.02,
            fallback_to_soft=False,  # a soft lock would outlive a killed holder
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, NotImplementedError):
            yield None
            return
        try:
            yield self._folder / f"last-{kind}"
        finally:
            lock.release()


def _age_s(stamp: Path) -> float:
    """Seconds since the last request, by a clock that may have been changed; infinite without a file."""
    try:
        return time.time() - stamp.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    except OSError:
        return 0.0
