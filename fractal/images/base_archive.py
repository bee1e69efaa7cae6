"""The filter that makes a base image of mmdebstrap's archive: what is left out, and the same times everywhere.

    python3 base_archive.py WHOLE.tar LEFT_OUT MODES START > FILTERED.tar

Standard library alone: this file is also sent to an instance and run there.
"""

import io
import re
import sys
import tarfile

EMPTY = ("etc/hostname", "etc/hosts", "etc/resolv.conf")  # the engine mounts its own there, and would make them


def normalize(old: tarfile.TarFile, new: tarfile.TarFile, left_out: str, modes: int, start: int) -> None:
    """Copy what is not left out. What was written since `start` (a Unix time) gets the time 0 and no trace of the day.

    Older times stay: Python's compiled files know those of their sources.
    """
    drop = re.compile(left_out)
    for member in old:
        name = member.name.removeprefix("./")
        if drop.match(name) or name in EMPTY:
            continue
        member.mode &= modes
        if member.mtime >= start:
            member.mtime = 0
        content = old.extractfile(member) if member.isreg() else None
        if content is not None and re.fullmatch("etc/shadow-?", name):
            # The third field is the day on which the account was made.
            text = re.sub(rb"(?m)^([^:]*:[^:]*:)\d*:", rb"\1:", content.read())
            member.size, content = len(text), io.BytesIO(text)
        new.addfile(member, content)
    for name in EMPTY:
        new.addfile(tarfile.TarInfo(f"./{name}"))


if __name__ == "__main__":
    whole, left_out, modes, start = sys.argv[1:]
    output = sys.stdout.buffer
    with tarfile.open(whole) as old, tarfile.open(fileobj=output, mode="w|", format=tarfile.GNU_FORMAT) as new:
        normalize(old, new, left_out, int(modes), int(start))
