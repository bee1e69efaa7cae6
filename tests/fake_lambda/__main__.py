"""Serve the fake cloud until SIGTERM or Ctrl-C: python -m tests.fake_lambda [--machines] [--state FILE]. Prints its URL."""

import argparse
import signal
import sys
import threading
from pathlib import Path

from tests.fake_lambda.server import FakeLambda, MachineFactory


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fake_lambda", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0: a free one")
    parser.add_argument("--key", default="secret-key", help="the API key it accepts")
    parser.add_argument(
        "--machines", action="store_true", help="launched instances are containers with sshd and Docker"
    )
    parser.add_argument("--state", type=Path, help="keep this file at what is billed, as JSON")
    parser.add_argument("--no-rate", action="store_true", help="no limit of requests")
    parser.add_argument("--request-interval-s", type=float, default=1.0)
    parser.add_argument("--launch-interval-s", type=float, default=12.0)
    parser.add_argument("--quota", type=int, default=8)
    parser.add_argument("--boot-s", type=float, default=0.0)
    parser.add_argument("--terminate-s", type=float, default=0.0)
    parser.add_argument("--hidden-s", type=float, default=0.0)
    words = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    cloud = FakeLambda(
        key=words.key,
        machines=machines() if words.machines else None,
        rate=not words.no_rate,
        request_interval_s=words.request_interval_s,
        launch_interval_s=words.launch_interval_s,
        quota=words.quota,
        boot_s=words.boot_s,
        terminate_s=words.terminate_s,
        hidden_s=words.hidden_s,
        port=words.port,
        state=words.state,
    )
    with cloud:
        print(cloud.url, flush=True)
        while not ended.wait(1.0):  # a wait without end would not let signals in everywhere
            pass
    for trouble in cloud.troubles:
        print(trouble, file=sys.stderr)


def machines() -> MachineFactory:
    from importlib import import_module

    factory: MachineFactory = import_module("tests.fake_lambda.machines").Machines()
    return factory


if __name__ == "__main__":
    main()
