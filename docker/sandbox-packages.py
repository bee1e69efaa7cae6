"""Describes a sandbox image's packages (sandbox/inside/packages.py): which modules those named have, and what address
space they take. Run while the image is built: sandbox-packages.py '["numpy"]' FILE. Standard library alone.
"""

import importlib
import json
import sys
from importlib import metadata


def address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * 4096


def main() -> None:
    wanted = {metadata.distribution(name).metadata["Name"] for name in json.loads(sys.argv[1])}
    owners = metadata.packages_distributions()
    modules = sorted(
        module for module, names in owners.items() if wanted & set(names) and module[0] != "_" and module.isidentifier()
    )
    before, loaded, failed = address_space(), [], []
    for module in modules:
        try:
            importlib.import_module(module)
            loaded.append(module)
        except Exception as error:
            failed.append(f"{module}: {type(error).__name__}: {error}")
    if modules and not loaded:
        sys.exit(f"error: {failed[0].splitlines()[0]}")
    with open(sys.argv[2], "w") as file:
        json.dump({"modules": loaded, "address_space": address_space() - before}, file)


main()
