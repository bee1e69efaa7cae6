"""The programs of tests/data, and their reader, which fractal.audit shares."""

from pathlib import Path

from fractal.audit.programs import Program, read_programs

DATA = Path(__file__).with_name("data")
__all__ = ["DATA", "Program", "read_programs"]
