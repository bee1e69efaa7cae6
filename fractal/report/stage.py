"""Stage 6: everything -> report/index.html, summary.json, a row of LOG.md, and the table on the terminal."""

import sys

from fractal import console
from fractal.report.inputs import NUMBERS, PAGE, TABLE, inputs
from fractal.rundir import RunDir


def run(folder: RunDir) -> None:
    """Write the report unless nothing changed since the last one, and print the table. Raises InputError."""
    now = inputs(folder)
    last = folder.manifest["config"].get("report")
    complete = all(folder.file(name).exists() for name in (PAGE, TABLE, NUMBERS))
    if complete and last and {**last, "bill": None} == {**now, "bill": None}:
        console.say("report: is there, nothing to do")
        sys.stdout.write(folder.file(TABLE).read_text(encoding="utf-8"))
    else:
        from fractal.report import make  # late: numpy and matplotlib take seconds to load

        folder.labels()
        with folder.stage("report", PAGE):
            make.write(folder, now["bill"])
        folder.manifest["config"]["report"] = now
        folder.save()
    console.say(f"report: {folder.file(PAGE)} and {folder.file(NUMBERS)}")
