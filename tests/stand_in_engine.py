"""An engine that answers by a request's seed, for the engines that Ray runs: what it answers depends on nothing else."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fractal.generate.engine import Completion, Request, never_stop


class StandIn:
    """`pause_s` for each span of `batch`. A file `kill`, `stop` or `fail` in `folder` befalls the first to claim it."""

    def __init__(self, folder: Path | None = None, pause_s: float = 0.0, batch: int = 8) -> None:
        self.folder, self.pause_s, self.batch = folder, pause_s, batch

    def generate(
        self, requests: Iterable[Request], should_stop: Callable[[], bool] = never_stop
    ) -> Iterator[list[Completion]]:
        span: list[Request] = []
        for request in requests:
            span.append(request)
            if len(span) == self.batch:
                yield self._decode(span)
                span = []
                if should_stop():
                    return
        if span:
            yield self._decode(span)

    def _decode(self, span: list[Request]) -> list[Completion]:
        time.sleep(self.pause_s)
        if self.folder:
            self._fault(self.folder)
        return [Completion(r, f"def f(x):\n    return {r.seed}", r.seed % 3 > 0, 7, -r.seed / 8) for r in span]

    def _fault(self, folder: Path) -> None:
        for name, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP), ("fail", 0)):
            try:
                (folder / name).rename(folder / f"{name}.{os.getpid()}")  # one process alone succeeds
            except OSError:
                continue
            if not number:
                raise RuntimeError("out of luck")
            os.kill(os.getpid(), number)
            time.sleep(60)  # the signal may reach another thread first

    def close(self) -> None: ...
