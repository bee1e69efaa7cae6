"""From a bare machine to a usable clone: packages, the Docker engine, GPUs, and what `doctor` reports."""
