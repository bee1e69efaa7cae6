"""What every function about rented instances works with: the API's client, the ledger, a log, and the timing."""

from collections.abc import Callable
from dataclasses import dataclass, field

from fractal.cloud.lambda_api import REQUEST_INTERVAL_S, Client
from fractal.cloud.ledger import Entry, Ledger

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Timing:
    """Intervals and timeouts, in seconds."""

    poll_s: float = 5.0  # between two requests while waiting for a state of an instance
    unknown_launch_s: float = 90.0  # a launch without a response shows its instance within this, or did not happen
    launch_request_s: float = 240.0  # from intent to request, at most: guard's start, rate limit and retries
    hidden_s: float = 180.0  # a new instance may not be listed for so long
    repeat_terminate_s: float = 60.0  # terminate is requested again
    terminate_timeout_s: float = 900.0  # until an instance is terminated
    unhealthy_s: float = 60.0  # an unhealthy instance may recover
    capacity_poll_s: float = 20.0  # between two requests for capacity
    guard_tick_s: float = 2.0  # a guard looks at clock and ledger: a laptop that wakes up is noticed within this
    guard_poll_s: float = 60.0  # a guard asks the API
    guard_retry_s: float = 5.0  # a guard's wait after a failure
    heartbeat_s: float = 120.0  # a guard tells the instance's watchdog that it is alive
    watchdog_tick_s: float = 15.0  # a watchdog looks
    guard_linger_s: float = 900.0  # a guard looks for a launch that seems not to have happened this much longer
    request_interval_s: float = REQUEST_INTERVAL_S  # of a guard's client


@dataclass(frozen=True, slots=True)
class Account:
    """An account at Lambda, and the ledger of the instances that this state folder launched in it."""

    client: Client
    ledger: Ledger
    log: Log
    timing: Timing = field(default_factory=Timing)

    def sees(self, entry: Entry) -> bool:
        """Whether the client would see the entry's instance: same address of the API, same key."""
        return (entry.url, entry.account) == (self.client.url, self.client.account)
