"""The user's token of the model hub, for gated models: from this machine into a container, and nowhere else.

It becomes a file in the container's memory that only the job's user can read (containers.py): so it is on no disk, in
no image, environment, command line, label or log. HF_TOKEN_PATH tells huggingface_hub where it is.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from fractal.errors import OutsideError

EMBEDDED_MODEL = "smollm2-135m-instruct"  # comes with a package, not from the hub
SWITCH = "HF_HUB_DISABLE_IMPLICIT_TOKEN"  # huggingface_hub's own: never send the token unasked


def find(arguments: Sequence[str], folder: Path) -> str:
    """The token for `fractal run` with these arguments in a run's folder; "" without one, or for a model on disk.

    Raises OutsideError if huggingface_hub cannot read it.
    """
    model = model_of(arguments, folder)
    if model in (None, EMBEDDED_MODEL) or model.startswith((".", "/", "~")) or Path(model).exists():
        return ""
    return read()


def read() -> str:
    """HF_TOKEN, or what `hf auth login` has kept; "" without one, or with SWITCH. Raises OutsideError."""
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
