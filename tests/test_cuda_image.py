"""The CUDA image on a machine without a GPU: what vLLM compiles at start and in decoding compiles there, into the cache.

    invoke build --image=pipeline && python -m pytest tests/test_cuda_image.py

Never builds the image: 11 GB. vLLM's own start, warm-up and decoding run on a stand-in GPU (cuda_image/stand_in_gpu.py), as the
image's user. What only a GPU can show: that the kernels compute rightly, CUDA graphs, inductor's timing of its kernels.
"""

import json
import secrets
from collections.abc import Iterator
from typing import Any

import docker
import pytest

from fractal.errors import InputError
from fractal.images import recipes
from fractal.images.containers import Setup, host_options
from fractal.images.docker_client import has_image
from tests.conftest import ROOT

pytestmark = [pytest.mark.docker, pytest.mark.long, pytest.mark.timeout(1200)]

# What reads the samples' tokens: precompiled, but for sm_100, where CuTe DSL compiles it without nvcc.
ATTENTION = {80: "_vllm_fa2_C::varlen_fwd", 90: "_vllm_fa3_C::fwd", 100: "FlashAttention 4"}
# Of vLLM's Triton kernels, those that every sample of ours goes through.
SAMPLING = {"_gumbel_sample_kernel", "_temperature_kernel", "_topk_topp_kernel", "_topk_log_softmax_kernel"}
# The start of CUB is what FlashInfer's sampler fails on where compiler and headers differ.
PROGRAM = "#include <cub/cub.cuh>\n__global__ void zero(float *x) { x[threadIdx.x] = 0; }\n"
COMPILE = f"""
grep -oP '#define CUDART_VERSION +\\K\\d+' $CUDA_HOME/include/cuda_runtime_api.h
$CUDA_HOME/bin/nvcc --version | grep -oP 'release \\K[\\d.]+'
printf '%s' '{PROGRAM}' > /tmp/zero.cu
for arch in 80 90a 100a; do
  $CUDA_HOME/bin/nvcc -I$CUDA_HOME/include/cccl -arch=sm_$arch -cubin -o /tmp/$arch.cubin /tmp/zero.cu && echo sm_$arch
done
"""


@pytest.fixture(scope="module")
def cuda_image(client: docker.DockerClient) -> str:
    try:
        (recipe,) = recipes.choose("pipeline")
    except InputError as error:
        pytest.skip(str(error))  # this copy lacks what the image is made from
    if not has_image(client, recipe.name):
        pytest.skip(f"{recipe.name} is not here. Run: invoke build --image=pipeline")
    return recipe.name


@pytest.fixture
def volume(client: docker.DockerClient) -> Iterator[str]:
    """An empty cache volume."""
    name = f"fractal-test-{secrets.token_hex(4)}"
    client.volumes.create(name)
    yield name
    client.volumes.get(name).remove(force=True)


def run(client: docker.DockerClient, image: str, volume: str, arguments: list[str]) -> str:
    """What `sh WORDS` prints in a container as a run has it, without network."""
    given = host_options(Setup(sidecar="none", network=False))
    given["binds"] = [f"{volume}:{recipes.CACHE}", f"{ROOT}/tests/cuda_image:/check:ro"]
    made = client.api.create_container(
        image, arguments, entrypoint=["sh"], user=recipes.USER, host_config=client.api.create_host_config(**given)
    )["Id"]
    try:
        client.api.start(made)
        code = client.api.wait(made, timeout=1100)["StatusCode"]
        assert code == 0, client.api.logs(made, tail=60).decode()
        return client.api.logs(made, stderr=False).decode()
    finally:
        client.api.remove_container(made, force=True)


def test_the_compiler_fits_its_headers(client: docker.DockerClient, cuda_image: str, volume: str) -> None:
    version, release, *compiled = run(client, cuda_image, volume, ["-ec", COMPILE]).split()
    major, minor = map(int, release.split("."))
    assert int(version) == 1000 * major + 10 * minor
    assert compiled == ["sm_80", "sm_90a", "sm_100a"]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("runner", ["generate", "pooling"])
def test_vllm_starts_and_compiles_what_it_asks_for(
    client: docker.DockerClient, cuda_image: str, volume: str, capability: int, runner: str
) -> None:
    lines = run(client, cuda_image, volume, ["/check/start.sh", str(capability), runner]).splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    assert (found["uid"], found["capabilities"], found["outputs"]) == (1000, 0, 4)
    assert found["kernels"]
    assert {name: value for name, value in found["kernels"].items() if value != [capability, True]} == {}
    assert runner == "pooling" or set(found["kernels"]) >= SAMPLING
    assert ATTENTION[capability] in found["precompiled"]
    assert not set(ATTENTION.values()) - {ATTENTION[capability]} & set(found["precompiled"])
    inductor = any(name.startswith("triton_") for name in found["kernels"])
    assert inductor == (runner == "generate")  # the scorer runs eagerly
    assert found["cubins"] >= len(found["kernels"])  # in the cache, where the next start finds them
    assert not found["sampler"]  # FlashInfer's
    assert not {"nvcc", "ninja", "cmake"} & set(found["programs"])
