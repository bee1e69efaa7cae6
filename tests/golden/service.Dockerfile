# A small service.
#
#   docker run service
ARG BASE=debian:bookworm-slim
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
    { dpkg -s gcc python3 > /dev/null 2>&1 \
   || { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc python3; }; } \
 && mkdir -p /usr/share/fractal \
 && dpkg-query -W > /usr/share/fractal/debian-packages \
 && find /var/log /var/cache -xdev -type f ! -path '*/debconf/*' -exec truncate -s 0 {} +

# Python packages, exactly those of requirements.lock.
RUN --mount=type=tmpfs,target=/run \
    --mount=type=bind,from=uv,source=/uv/bin/uv,target=/run/uv \
    /run/uv venv --no-cache --quiet /opt/venv
ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH
RUN --mount=type=tmpfs,target=/run \
    --mount=type=bind,from=uv,source=/uv/bin/uv,target=/run/uv \
    --mount=type=cache,target=/run/cache \
    --mount=type=bind,source=requirements.lock,target=/run/requirements.lock \
    PYC_INVALIDATION_MODE=UNCHECKED_HASH /run/uv --cache-dir /run/cache pip install --link-mode copy --compile-bytecode --no-deps --require-hashes -r /run/requirements.lock

# Python packages, pinned.
RUN --mount=type=tmpfs,target=/run \
    --mount=type=bind,from=uv,source=/uv/bin/uv,target=/run/uv \
    --mount=type=cache,target=/run/cache \
    PYC_INVALIDATION_MODE=UNCHECKED_HASH /run/uv --cache-dir /run/cache pip install --link-mode copy --compile-bytecode --no-deps colorama==0.4.6

ENV GREETING='it'"'"'s $5 a "day"' \
    LANG=C.UTF-8

USER 1000:1000

USER 0
RUN mkdir -p /work
USER 1000:1000
WORKDIR /work

ENTRYPOINT ["python3", "-m", "app"]

# Local files: the same owner, modes and times everywhere. Folders that are there already keep their own.
FROM part1 AS local1
USER 0
SHELL ["/bin/sh", "-ec"]
COPY app/ /local/app/app
COPY config.json /local/etc/app/config.json
RUN cd /local && chmod -R u=rwX,go=rX . && find . -exec touch -hd @0 {} + \
 && find . -type d -exec sh -ec 'for d; do \
      if [ -L "/$d" ]; then echo "error: ${d#.} is a link to $(readlink "/$d"): add files there"; exit 1; fi; \
      if [ -d "/$d" ]; then chmod $(stat -c %a "/$d") "$d"; chown $(stat -c %u:%g "/$d") "$d"; fi; done' sh {} +

FROM part1

# Local files last: an edit of them builds and pushes this layer alone.
ENV PYTHONPATH=/app
COPY --from=local1 /local/ /
