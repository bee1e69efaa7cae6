"""`fractal doctor`: can this machine build images?"""

from contextlib import closing

from fractal.errors import OutsideError
from fractal.images import buildkit
from fractal.images.docker_client import connect
from fractal.install.doctor import Finding


def check_builder() -> Finding:
    """Images are built with BuildKit, by a docker command."""
    try:
        with closing(connect()) as client:
            return Finding("image builder", "ok", f"BuildKit, by {buildkit.find_command(client)}")
    except OutsideError as error:
        return Finding("image builder", "missing", "no BuildKit", str(error))
