"""A machine's NVIDIA driver beside what the CUDA image needs: the decision, and what a machine says of itself."""

import pytest

from fractal.cloud.remote_host import parse_driver
from fractal.images import containers, driver_compatibility, recipes

PULLED = "nvidia/cuda:13.0.1-base-ubuntu24.04 pulled"
MADE = "fractal-base-whole:1 bootstrapped"
A100, T4, GEFORCE = "NVIDIA A100-SXM4-80GB", "Tesla T4", "NVIDIA GeForce RTX 4090"
NOTHING, COMPAT = {}, {"LD_LIBRARY_PATH": driver_compatibility.COMPAT}


CASES = [
    ("580.65.06", [A100], PULLED, NOTHING),  # the image's own
    ("580.95.05", [GEFORCE], MADE, NOTHING),
    ("595.10", [A100], PULLED, NOTHING),
    ("", [], PULLED, NOTHING),  # nobody knows: the container will tell
    ("570.195.03", [A100, A100], PULLED, COMPAT),
    ("535.183.01", ["NVIDIA H100 80GB HBM3"], "", COMPAT),  # of an image that is not there yet
    ("550.54.15", [T4], PULLED, COMPAT),
    ("550.54.15", ["NVIDIA A10"], PULLED, COMPAT),
    ("570.195.03", ["NVIDIA GH200 480GB"], PULLED, COMPAT),
    ("580.30", [GEFORCE], PULLED, "branches 535, 550, 570, 575 only"),  # a beta of the image's own branch
    ("470.256.02", [A100], PULLED, "branches 535, 550, 570, 575 only"),
    ("570.195.03", [GEFORCE], PULLED, "data-centre GPUs only, not NVIDIA GeForce RTX 4090"),
    ("570.195.03", [A100, GEFORCE], PULLED, "not NVIDIA GeForce RTX 4090"),
    ("570.195.03", ["NVIDIA RTX A6000"], PULLED, "not NVIDIA RTX A6000"),
    ("570.195.03", ["NVIDIA RTX A4000"], PULLED, "not NVIDIA RTX A4000"),
    ("570.195.03", [A100], MADE, "base was made here from Debian's packages"),
]


def test_a_driver_is_compared_with_what_the_image_needs() -> None:
    wrong = []
    for version, gpus, base, expected in CASES:
        try:
            result: object = driver_compatibility.environment(version, gpus, base=base, remedy="Upgrade it.")
        except driver_compatibility.DriverError as error:
            result = str(error)
            begins = f"NVIDIA's driver {version} is too old for the CUDA image, which needs 580.65; "
            if result.startswith(begins) and result.endswith("Upgrade it.") and "\n" not in result:
                result = expected if str(expected) in result else result
        if result != expected:
            wrong.append(f"{version} {gpus} {base}: {result}")
    assert wrong == []


def test_the_compatibility_libraries_are_of_the_bases_cuda() -> None:
    major_minor = ".".join(recipes.BASE["cuda"].split(":")[1].split(".")[:2])
    assert f"/usr/local/cuda-{major_minor}/compat" == driver_compatibility.COMPAT


def test_a_machine_names_its_driver_and_gpus() -> None:
    text = "570.195.03, NVIDIA A100-SXM4-80GB\n570.195.03, NVIDIA A100-SXM4-80GB\n"
    assert parse_driver(text) == ("570.195.03", (A100, A100))
    assert parse_driver("NVIDIA-SMI has failed because it couldn't communicate, reboot.\n") == ("", ())
    assert parse_driver("") == ("", ())


def test_a_run_on_this_machines_gpu_is_refused_before_the_image_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers.gpu, "driver_version", lambda: "470.256.02")
    (recipe,) = recipes.choose("pipeline")
    with pytest.raises(driver_compatibility.DriverError, match="--image=pipeline-cpu"):
        containers._driver_environment(None, recipe)
