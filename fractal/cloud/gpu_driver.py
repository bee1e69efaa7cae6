"""The NVIDIA driver and the GPUs of an instance, as nvidia-smi reports them."""

import re
from typing import NamedTuple

QUERY = "nvidia-smi --query-gpu=driver_version,name --format=csv,noheader"


class Driver(NamedTuple):
    """A driver, and the GPUs that it drives."""

    version: str = ""  # "580.95.05"; empty without a driver
    gpus: tuple[str, ...] = ()  # names, such as "NVIDIA A100-SXM4-80GB"


def parse(text: str) -> Driver:
    """The output of QUERY: a line "580.95.05, NVIDIA H100 80GB HBM3" for each GPU. Other lines are ignored."""
    pairs = [line.strip().split(", ", 1) for line in text.splitlines() if re.match(r"\d+\.\d+[\d.]*, ", line)]
    return Driver(pairs[0][0] if pairs else "", tuple(name for _, name in pairs))
