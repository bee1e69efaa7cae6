"""The user's token of the model hub, for gated models: from this machine into a container, and nowhere else.

It goes into a created container by the engine's API, as a file that only the job's user can read: so it is in no image,
environment, command line, label or log. HF_TOKEN_PATH tells huggingface_hub where it is.
"""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from fractal.errors import OutsideError

PATH = "/run/secrets/hf_token"
EMBEDDED_MODEL = "smollm2-135m-instruct"  # comes with a package, not from the hub
SWITCH = "HF_HUB_DISABLE_IMPLICIT_TOKEN"  # huggingface_hub's own: never send the token unasked


def find(arguments: Sequence[str], folder: Path) -> str:
    """The token for `fractal run` with these arguments in a run's folder; "" without one, or for a model on disk.

    HF_TOKEN, or what `hf auth login` has kept. Raises OutsideError if huggingface_hub cannot read it.
    """
    model = model_of(arguments, folder)
    if model in (None, EMBEDDED_MODEL) or model.startswith((".", "/", "~")) or Path(model).exists():
        return ""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return ""
    try:
        return get_token() or ""
    except Exception as error:  # a file that is not ours to read, a trusted publisher's exchange
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutsideError(f"The Hugging Face token cannot be read: {reason}. Mend that, or set {SWITCH}=1.") from error


def model_of(arguments: Sequence[str], folder: Path) -> str | None:
    """The model that `fractal run` with these arguments takes: --model, else the one that the run was made with."""
    for option, value in pairwise([*arguments, ""]):
        if option == "--model":
            return value
        if option.startswith("--model="):
            return option.removeprefix("--model=")
    try:
        return str(json.loads((folder / "manifest.json").read_bytes())["config"]["generate"]["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def archive(token: str, user: str) -> bytes:
    """A tar for the container's root: the token as a file of this user ("uid:gid") that nobody else reads."""
    uid, _, gid = user.partition(":")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        folder = tarfile.TarInfo(os.path.dirname(PATH).lstrip("/"))
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(folder)
        file = tarfile.TarInfo(PATH.lstrip("/"))
        file.mode, file.uid, file.gid, file.size = 0o400, int(uid), int(gid), len(token.encode())
        tar.addfile(file, io.BytesIO(token.encode()))
    return packed.getvalue()
