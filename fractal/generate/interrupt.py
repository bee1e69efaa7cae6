"""Ctrl-C and SIGTERM during generation: held back until the finished samples are on disk."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self


class DeferredInterrupt:
    """Records a first SIGINT or SIGTERM instead of acting on it; a second one raises KeyboardInterrupt at once.

        with DeferredInterrupt() as interrupt:
            for batch in engine.generate(requests, interrupt.received):
                ...

    Outside the main thread, where Python delivers no signals, nothing is changed.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: dict[int, Any] = {}

    def received(self) -> bool:
        return self._received

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            raise KeyboardInterrupt
        self._received = True
        os.write(2, b"\nfractal: writing the finished samples, then it ends. Once more: it ends at once.\n")

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
