"""What a report is made from, as digests: whether it has to be written again, and why a check finds differences."""

import copy
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

from fractal.jsonl import encode
from fractal.rundir import RunDir

FILES = (  # all that a report reads
    "problems.jsonl", "samples.jsonl", "labels.jsonl", "scores.jsonl", "selection.jsonl", "outputs.jsonl",
    "critic/metrics.jsonl", "critic/splits.json",
)  # fmt: skip
PAGE, TABLE, NUMBERS = "report/index.html", "report/table.txt", "summary.json"  # what it consists of


def inputs(folder: RunDir) -> dict[str, Any]:
    """Digests of records, manifest and code, versions of packages, and the bill until now."""
    manifest = without_report(folder.manifest, {"price_usd_per_hour": None, "cost_usd": None})
    return {
        "files": {name: folder.digest(name) for name in FILES},
        "manifest": hashlib.sha256(encode(manifest)).hexdigest(),
        "code": code_digest(),
        "packages": {name: metadata.version(name) for name in ("matplotlib", "numpy", "pygments")},
        "bill": {name: folder.manifest.get(name) for name in ("price_usd_per_hour", "cost_usd")},
    }


def code_digest() -> str:
    """sha256 over the sources of the stages and of what they share."""
    total = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.[ph]*")):
        name = file.relative_to(package)
        if file.suffix in {".py", ".html"} and name.parts[0] not in {"cloud", "images", "install", "sandbox"}:
            total.update(str(name).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def without_report(manifest: dict[str, Any], bill: dict[str, Any]) -> dict[str, Any]:
    """The manifest without what the report itself leaves there: its time, its inputs, and what its seconds cost.

    `bill` holds price and cost as they were when the report began.
    """
    kept = copy.deepcopy(manifest)
    kept["stages"].pop("report", None)
    kept["config"].pop("report", None)
    return kept | bill
