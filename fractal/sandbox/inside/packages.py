"""What the image has beside the standard library: packages (images/packages.py). Standard library only."""

import json
from typing import NamedTuple

DESCRIPTION = "/usr/share/fractal/packages.json"
# Libraries read these when they are loaded: a candidate may have few threads, and no label depends on their number.
ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Installed(NamedTuple):
    """Modules that every candidate finds loaded, and the bytes of address space that they take, on top of its limit."""

    modules: list[str]
    address_space: int


def installed() -> Installed:
    try:
        with open(DESCRIPTION) as file:
            found = json.load(file)
    except FileNotFoundError:
        return Installed([], 0)
    return Installed(found["modules"], found["address_space"])
