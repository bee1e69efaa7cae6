"""Modules that a program or its tests import and the sandbox does not have: the sandbox's lack, and said so. Pure."""

import re
import sys
from collections import Counter

_MISSING = re.compile(r"(test \d+: )?ModuleNotFoundError: No module named '([A-Za-z_]\w*)'")
_DETAIL = re.compile(r"(?:test \d+: )?no module named (\w+) in the sandbox")
# Packages that are not called like their module.
PACKAGES = {
    "Crypto": "pycryptodome", "PIL": "pillow", "bs4": "beautifulsoup4", "cv2": "opencv-python-headless",
    "dateutil": "python-dateutil", "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "pyyaml",
}  # fmt: skip
MAX_NAMED = 10


def explain(detail: str) -> str:
    """The detail of a status `error`, with a missing module named as what the sandbox lacks."""
    match = _MISSING.match(detail)
    if match is None or match[2] in sys.stdlib_module_names:
        return detail
    package = PACKAGES.get(match[2], match[2])
    return f"{match[1] or ''}no module named {match[2]} in the sandbox; --packages {package}==VERSION"


def module(detail: str) -> str:
    """The module that the sandbox lacks, by a label's detail; "" for any other one."""
    match = _DETAIL.match(detail)
    return match[1] if match else ""


def summary(modules: Counter[str]) -> str:
    """One line for people, with the option to give."""
    count, ranked = modules.total(), modules.most_common(MAX_NAMED)
    programs = "1 program needs" if count == 1 else f"{count:,} programs need"
    more = f" and {len(modules) - MAX_NAMED} more" if len(modules) > MAX_NAMED else ""
    option = ",".join(f"{PACKAGES.get(name, name)}==VERSION" for name, _ in ranked)
    named = ", ".join(f"{name} ({n:,})" for name, n in ranked)
    return f"verify: {programs} packages that the sandbox does not have: {named}{more}. --packages {option}"
