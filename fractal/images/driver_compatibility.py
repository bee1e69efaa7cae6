"""Whether a machine's NVIDIA driver runs the CUDA image, decided before anything large is sent there. Pure.

A driver older than the image's CUDA still runs it on data-centre GPUs, by the compatibility libraries (cuda-compat)
that NVIDIA's base image holds: NVIDIA, CUDA Compatibility, "Forward Compatibility". The loader has to find them before
the driver's own, so it has to know them when the process starts: LD_LIBRARY_PATH of the container. vLLM's own
VLLM_ENABLE_CUDA_COMPATIBILITY sets that in a process that runs already, which reaches only its children.
"""

import re
from collections.abc import Iterable

from fractal.errors import OutsideError
from fractal.images.recipes import MINIMUM_DRIVER

COMPAT = "/usr/local/cuda-13.0/compat"  # of the package cuda-compat-13-0
COMPAT_BRANCHES = (535, 550, 570, 575)
# As nvidia-smi names them: "NVIDIA A100-SXM4-80GB", "NVIDIA GH200 480GB", "Tesla T4". Of RTX GPUs only some servers'
# count, which the name does not tell.
DATA_CENTRE = re.compile(
    r"\b(?:A2|A10|A10G|A16|A30|A40|A100|A100X|A800|B100|B200|B300|GB200|GB300|GH200|H20|H100|H200|H800"
    r"|L2|L4|L20|L40|L40S|T4)\b"
)


class DriverError(OutsideError):
    """The driver is too old, and nothing helps: one line with the remedy."""


def environment(version: str, gpus: Iterable[str], *, base: str, remedy: str) -> dict[str, str]:
    """What the container's environment needs for this driver: nothing, or where the compatibility libraries are.

    `gpus`: names of the machine's GPUs; `base`: the image's label of where its base came from, "" if unknown;
    `remedy`: the end of the error. A version that is no number passes: the container will tell. Raises DriverError.
    """
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None or (int(number[1]), int(number[2])) >= MINIMUM_DRIVER:
        return {}
    minimum = ".".join(map(str, MINIMUM_DRIVER))
    if int(number[1]) not in COMPAT_BRANCHES:
        branches = ", ".join(map(str, COMPAT_BRANCHES))
        lacks = f"compatibility libraries help branches {branches} only"
    elif others := sorted({name for name in gpus if not DATA_CENTRE.search(name)}):
        lacks = f"compatibility libraries help data-centre GPUs only, not {others[0]}"
    elif base.endswith("bootstrapped"):
        lacks = "this image has no compatibility libraries, since its base was made here from Debian's packages"
    else:
        return {"LD_LIBRARY_PATH": COMPAT}
    raise DriverError(
        f"NVIDIA's driver {version} is too old for the CUDA image, which needs {minimum}; {lacks}. {remedy}"
    )
