"""`fractal doctor`: can this machine build images?"""

from fractal.errors import OutsideError
from fractal.images import buildkit
from fractal.install.doctor import Finding


def check_builder() -> Finding:
    """Images are built with BuildKit, by a docker command."""
    try:
        return Finding("image builder", "ok", f"BuildKit, by {buildkit.find_command()}")
    except OutsideError as error:
        return Finding("image builder", "missing", "no BuildKit", str(error))
