"""What the events of a Docker engine's push say: layers that are there, bytes sent so far."""

from typing import Any

PRESENT = ("Layer already exists", "Mounted from", "Pushed")


class PushProgress:
    """Counts over all attempts of one push; `update` takes each event of the engine's push API."""

    def __init__(self) -> None:
        self.sent: set[str] = set()  # layers sent: 12 digits of a diff id or of a blob's digest, as in the events
        self.began = False  # whether the registry answered and the engine came to the layers
        self._present: dict[str, bool] = {}
        self._bytes: dict[str, tuple[int, int]] = {}  # layer -> bytes sent, bytes in all; uncompressed

    def update(self, event: dict[str, Any]) -> None:
        layer, status = event.get("id"), str(event.get("status", ""))
        if layer is None:
            return
        self.began = True
        self._present[layer] = status.startswith(PRESENT)
        if status == "Pushed":
            self.sent.add(layer)
        detail = event.get("progressDetail") or {}
        if status == "Pushing" and "current" in detail:
            # The archive's own blocks come on top of the files' sizes, which make the total.
            self._bytes[layer] = detail["current"], max(detail.get("total", 0), detail["current"])

    @property
    def bytes_sent(self) -> int:
        """Bytes of the layers that were sent, before compression."""
        return sum(total for layer, (_, total) in self._bytes.items() if layer in self.sent)

    def __str__(self) -> str:
        sent = sum(done for done, _ in self._bytes.values()) / 1e6
        total = sum(size for _, size in self._bytes.values()) / 1e6
        return (
            f"{sum(self._present.values())} of {len(self._present)} layers are there, {sent:.0f} of {total:.0f} MB sent"
        )
