"""Makes a problem's calls of a program, many of them under way at once, so that neither end waits for the other.

Trusted, in the judge; standard library only.
"""

from collections import deque
from typing import Any

from fractal.sandbox.inside.calls import Calls, is_right, recorded, shorten
from fractal.sandbox.inside.protocol import ProtocolError
from fractal.sandbox.inside.proxy import JudgeEndpoint

IN_FLIGHT_BYTES = 32 << 10  # of calls sent ahead: what a socket's buffer holds
RESULT = b'["r",'  # before an encoded result, which a bracket ends


class CallRunner:
    """The calls of one program: sent ahead as far as the socket takes them, answered in order."""

    def __init__(self, endpoint: JudgeEndpoint, calls: Calls) -> None:
        self._endpoint, self._calls = endpoint, calls
        self._sent = 0
        self._in_flight = 0  # bytes
        self._answers: deque[bytes] = deque()  # received before their turn
        self._received = 0
        self.values: list[str] = []  # what the reference returned

    def check(self, number: int) -> None:
        """Compare what call `number` returned, or record it; from 0, in order.

        Raises AssertionError if it is wrong, and the program's exception.
        """
        self._send(number)
        if not self._answers:
            self._receive()
        answer = self._answers.popleft()
        text = answer[len(RESULT) : -1] if answer.startswith(RESULT) else b""
        if self._calls.expected is None:
            self._record(answer, text)
            return
        expected = self._calls.expected[number]
        if self._calls.compare is None and expected.is_text(text):
            return
        result = self._value(answer)
        if not is_right(self._calls, number, result, expected.value()):
            raise AssertionError(f"expected {shorten(expected.value())}, got {shorten(result)}")

    def _record(self, answer: bytes, text: bytes) -> None:
        if not text:
            self._value(answer)  # raises
        try:
            self.values.append(recorded(text))
        except ProtocolError:
            raise AssertionError("the reference returns what is no plain value") from None

    def _value(self, answer: bytes) -> Any:
        """What an answer holds. To look at an object of the program's asks it, and it answers in order: all other
        answers are received before. A plain value asks nothing: a later call that hangs is not this one's fault.
        """
        before = self._endpoint.references
        message = self._endpoint.decode(answer)
        if self._endpoint.references > before:
            self.receive_all()
        return self._endpoint.value(message)

    def _send(self, number: int) -> None:
        """Send call `number` if it has not been, and more while they fit; not one by one."""
        if self._sent > number and self._in_flight > IN_FLIGHT_BYTES // 2:
            return
        frames, batch = self._calls.frames, []
        while self._sent < len(frames):
            frame = frames[self._sent]
            if self._sent > number and self._in_flight + len(frame) > IN_FLIGHT_BYTES:
                break
            batch.append(frame)
            self._in_flight += len(frame)
            self._sent += 1
        if batch:
            self._endpoint.send_frames(b"".join(batch))

    def _receive(self) -> None:
        self._answers.append(self._endpoint.receive_body())
        self._in_flight -= len(self._calls.frames[self._received])
        self._received += 1

    def receive_all(self) -> None:
        while self._received < self._sent:
            self._receive()
