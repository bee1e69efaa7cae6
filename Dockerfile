# The pipeline on an NVIDIA GPU (driver 580.65 or newer): vLLM, torch, transformers and Fractal's stages.
# Rendered from fractal/images/recipes.py by `invoke render`; a test fails where they differ.
#
#   docker run --rm -v fractal-cache:/cache -v $PWD/runs:/work/runs ... run --run runs/NAME
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE} AS base
# It sets back the times of what a RUN wrote: the same contents are the same layer on any machine.
SHELL ["/bin/sh", "-c", "begun=@$(($(date +%s) - 600)); sh -ec \"$0\" && { find / -xdev -newermt \"$begun\" -exec touch -hcd @0 {} + 2> /dev/null || :; }"]

# uv installs the Python packages and stays out of the image.
FROM base AS uv
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    { dpkg -s python3-venv > /dev/null 2>&1 \
   || { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv; }; } \
 && mkdir -p /usr/share/fractal \
 && dpkg-query -W > /usr/share/fractal/debian-packages \
 && find /var/log /var/cache -xdev -type f ! -path '*/debconf/*' -exec truncate -s 0 {} +
RUN --mount=type=tmpfs,target=/run \
    --mount=type=bind,source=docker/uv.lock,target=/run/uv.lock \
    python3 -m venv /uv \
 && /uv/bin/pip install --no-cache-dir --no-deps --require-hashes -r /run/uv.lock

FROM base AS part1

# Debian packages, as the base's release has them; which ones: /usr/share/fractal/debian-packages.
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    { dpkg -s ca-certificates g++ gcc libc6-dev libnuma1 python3 python3-dev > /dev/null 2>&1 \
   || { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates g++ gcc libc6-dev libnuma1 python3 python3-dev; }; } \
 && mkdir -p /usr/share/fractal \
 && dpkg-query -W > /usr/share/fractal/debian-packages \
 && find /var/log /var/cache -xdev -type f ! -path '*/debconf/*' -exec truncate -s 0 {} +

# Python packages, exactly those of docker/cuda-torch.lock.
RUN --mount=type=tmpfs,target=/run \
    --mount=type=bind,from=uv,source=/uv/bin/uv,target=/run/uv \
    /run/uv venv --no-cache --quiet /opt/venv
ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH
RUN --mount=type=tmpfs,target=/run \
    --mount=type=bind,from=uv,source=/uv/bin/uv,target=/run/uv \
    --mount=type=cache,target=/run/cache \
    --mount=type=bind,source=docker/cuda-torch.lock,target=/run/cuda-torch.lock \
    PYC_INVALIDATION_MODE=UNCHECKED_HASH /run/uv --cache-dir /run/cache pip install --link-mode copy --compile-bytecode --no-deps --require-hashes -r /run/cuda-torch.lock

# Python packages, exactly those of docker/cuda.lock.
RUN --mount=type=tmpfs,target=/run \
    --mount=type=bind,from=uv,source=/uv/bin/uv,target=/run/uv \
    --mount=type=cache,target=/run/cache \
    --mount=type=bind,source=docker/cuda.lock,target=/run/cuda.lock \
    PYC_INVALIDATION_MODE=UNCHECKED_HASH /run/uv --cache-dir /run/cache pip install --link-mode copy --compile-bytecode --no-deps --require-hashes -r /run/cuda.lock

# CUDA's compiler, headers and libraries come as Python packages; kernels look for them here.
RUN ln -s /opt/venv/lib/python3*/site-packages/nvidia/cu13 /opt/cuda && cd /opt/cuda && ln -s lib lib64 && cd lib && for file in *.so.*; do [ -e ${file%%.so.*}.so ] || ln -s $file ${file%%.so.*}.so; done

# Local files: the same owner, modes and times everywhere. Folders that are there already keep their own.
FROM part1 AS local1
USER 0
SHELL ["/bin/sh", "-ec"]
COPY docker/cuda-torch.lock /local/app/docker/cuda-torch.lock
COPY docker/cuda.lock /local/app/docker/cuda.lock
RUN cd /local && chmod -R u=rwX,go=rX . && find . -exec touch -hd @0 {} + \
 && find . -type d -exec sh -ec 'for d; do \
      if [ -L "/$d" ]; then echo "error: ${d#.} is a link to $(readlink "/$d"): add files there"; exit 1; fi; \
      if [ -d "/$d" ]; then chmod $(stat -c %a "/$d") "$d"; chown $(stat -c %u:%g "/$d") "$d"; fi; done' sh {} +

FROM part1 AS part2

COPY --from=local1 /local/ /

# Models, compiled kernels and runs lie in volumes, which any user may write to.
RUN mkdir -m 1777 -p /cache /work /work/runs

ENV CUDA_CACHE_PATH=/cache/cuda \
    CUDA_HOME=/opt/cuda \
    FLASHINFER_WORKSPACE_BASE=/cache \
    FRACTAL_CACHE=/cache/fractal \
    HF_HOME=/cache/huggingface \
    HOME=/cache \
    LANG=C.UTF-8 \
    MPLCONFIGDIR=/cache/matplotlib \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all \
    PYTHONDONTWRITEBYTECODE=1 \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    USER=fractal \
    VLLM_CACHE_ROOT=/cache/vllm \
    VLLM_NO_USAGE_STATS=1 \
    VLLM_USE_FLASHINFER_SAMPLER=0 \
    XDG_CACHE_HOME=/cache

USER 1000:1000

USER 0
RUN mkdir -p /work
USER 1000:1000
WORKDIR /work

ENTRYPOINT ["/opt/venv/bin/python", "-m", "fractal"]

# Local files: the same owner, modes and times everywhere. Folders that are there already keep their own.
FROM part2 AS local2
USER 0
SHELL ["/bin/sh", "-ec"]
COPY fractal/ /local/app/fractal
RUN cd /local && chmod -R u=rwX,go=rX . && find . -exec touch -hd @0 {} + \
 && find . -type d -exec sh -ec 'for d; do \
      if [ -L "/$d" ]; then echo "error: ${d#.} is a link to $(readlink "/$d"): add files there"; exit 1; fi; \
      if [ -d "/$d" ]; then chmod $(stat -c %a "/$d") "$d"; chown $(stat -c %u:%g "/$d") "$d"; fi; done' sh {} +

FROM part2

# Local files last: an edit of them builds and pushes this layer alone.
ENV PYTHONPATH=/app
COPY --from=local2 /local/ /
