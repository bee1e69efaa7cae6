"""Makes a problem's calls of a program, many of them under way at once, so that neither end waits for the other.

Trusted, in the judge; standard library only.
"""

import json
from collections import deque
from typing import Any

from fractal.sandbox.inside.calls import Calls, is_right, refuse_object, shorten
from fractal.sandbox.inside.protocol import Encoder, Unencodable
from fractal.sandbox.inside.proxy import JudgeEndpoint

IN_FLIGHT_BYTES = 32 << 10  # of calls sent ahead: what a socket's buffer holds


class CallRunner:
    """The calls of one program: sent ahead as far as the socket takes them, answered in order."""

    def __init__(self, endpoint: JudgeEndpoint, calls: Calls) -> None:
        self._endpoint, self._calls = endpoint, calls
        self._sent = 0
        self._answers: deque[list[Any]] = deque()  # received before their turn
        self._received = 0
        self.values: list[str] = []  # what the reference returned, in tagged JSON

    def result(self, number: int) -> Any:
        """What call `number` returned, from 0; in order. Raises the program's exception."""
        frames, endpoint = self._calls.frames, self._endpoint
        size = sum(map(len, frames[self._received : self._sent]))
        batch: list[bytes] = []
        while self._sent < len(frames) and (self._sent == number or size + len(frames[self._sent]) <= IN_FLIGHT_BYTES):
            batch.append(frames[self._sent])
            size += len(frames[self._sent])
            self._sent += 1
        if batch:
            endpoint.send_frames(b"".join(batch))
        if not self._answers:
            self._receive()
        answer = self._answers.popleft()
        if endpoint.has_proxies():  # looking at the result may ask the program, which answers in order
            self.receive_all()
        return endpoint.value(answer)

    def _receive(self) -> None:
        self._answers.append(self._endpoint.reply())
        self._received += 1

    def receive_all(self) -> None:
        while self._received < self._sent:
            self._receive()

    def check(self, number: int) -> None:
        """Compare what a call returned, or record it. Raises AssertionError if it is wrong."""
        result = self.result(number)
        if self._calls.expected is None:
            try:
                self.values.append(json.dumps(Encoder(refuse_object).encode(result)))
            except (Unencodable, RecursionError) as error:
                raise AssertionError(f"the reference returns what is no plain value: {error}") from None
            return
        expected = self._calls.expected[number]
        if not is_right(self._calls, number, result, expected):
            raise AssertionError(f"expected {shorten(expected)}, got {shorten(result)}")
