"""Which sandbox images and limits a run's labels come from: the run's manifest says so, the labels do not."""

from dataclasses import asdict
from typing import Any

from fractal.rundir import RunDir
from fractal.sandbox.host.container import Sandbox
from fractal.sandbox.host.limits import Limits


def record_sandbox(folder: RunDir, limits: Limits, sandbox: Sandbox, labels: int) -> None:
    """Note image and limits before the first label is written: a stage that is killed has labels, too.

    `labels`: how many have a verdict already. They are counted for the images that were noted before this one, in
    `images.sandbox.labelled_by` of the manifest.
    """
    folder.configure("verify", {"limits": asdict(limits)})
    noted = folder.manifest["images"].get("sandbox", {})
    image: dict[str, Any] = {"name": sandbox.image, "digest": sandbox.image_id}
    if sandbox.packages:
        image["packages"] = sandbox.packages
    labelled_by = _counted(noted, labels)
    if not labelled_by or {key: labelled_by[-1].get(key) for key in image} != image:
        labelled_by = [entry for entry in labelled_by if entry["labels"]] + [{**image, "labels": 0}]
    folder.manifest["images"]["sandbox"] = {**image, "checks": sandbox.checks, "labelled_by": labelled_by}
    folder.save()


def count_labels(folder: RunDir, labels: int) -> None:
    """Count what the image that was noted last has labelled, now that there are so many labels with a verdict."""
    noted = folder.manifest["images"].get("sandbox", {})
    if "labelled_by" in noted and (labelled_by := _counted(noted, labels)) != noted["labelled_by"]:
        noted["labelled_by"] = labelled_by
        folder.save()


def _counted(noted: dict[str, Any], labels: int) -> list[dict[str, Any]]:
    """The images that labelled; those labels that no earlier one is noted for are the last one's."""
    entries: list[dict[str, Any]] = [dict(entry) for entry in noted.get("labelled_by", [])]
    if not entries and noted:  # of an earlier version, which noted the last image only
        entries = [{"name": noted["name"], "digest": noted["digest"]}]
    if entries:
        entries[-1]["labels"] = max(0, labels - sum(entry["labels"] for entry in entries[:-1]))
    return entries
