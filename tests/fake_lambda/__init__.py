"""A strict fake of the Lambda Cloud API over real HTTP, and simulated machines for what it launches."""

from tests.fake_lambda.server import FakeLambda, Fault, MachineFactory, Running

__all__ = ["FakeLambda", "Fault", "MachineFactory", "Running"]
