"""The errors that a command reports in one line, and the exit codes that they stand for."""


class InputError(Exception):
    """What the user gave cannot be used: one line that names the input and the remedy. Exit code 2."""


class OutsideError(Exception):
    """Something outside is missing (Docker, disk space, network, GPU): one line with the remedy. Exit code 3."""


class RecordError(InputError):
    """A file is not what it should be: path, line, field and what was expected."""
