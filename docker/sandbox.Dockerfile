# The sandbox: Python's standard library and the judge, nothing else.
# Rendered from fractal/images/recipes.py by `invoke render`; a test fails where they differ.
#
# Options of `docker run` wall it in (fractal/sandbox/host/container.py). The supervisor starts as root,
# because each untrusted program gets a user of its own.
ARG BASE=debian:bookworm-slim
FROM ${BASE} AS base
# It sets back the times of what a RUN wrote: the same contents are the same layer on any machine.
SHELL ["/bin/sh", "-c", "begun=@$(($(date +%s) - 600)); sh -ec \"$0\" && { find / -xdev -newermt \"$begun\" -exec touch -hcd @0 {} + 2> /dev/null || :; }"]

FROM base AS part1

# Debian packages, as the base's release has them; which ones: /usr/share/fractal/debian-packages.
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    { dpkg -s python3 python3-distutils > /dev/null 2>&1 \
   || { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-distutils; }; } \
 && mkdir -p /usr/share/fractal \
 && dpkg-query -W > /usr/share/fractal/debian-packages \
 && find /var/log /var/cache -xdev -type f ! -path '*/debconf/*' -exec truncate -s 0 {} +

ENV LANG=C.UTF-8

# Local files: the same owner, modes and times everywhere. Folders that are there already keep their own.
FROM part1 AS local1
USER 0
SHELL ["/bin/sh", "-ec"]
COPY fractal/__init__.py /local/sandbox/fractal/__init__.py
COPY fractal/sandbox/__init__.py /local/sandbox/fractal/sandbox/__init__.py
COPY fractal/sandbox/inside/ /local/sandbox/fractal/sandbox/inside
RUN cd /local && chmod -R u=rwX,go=rX . && find . -exec touch -hd @0 {} + \
 && find . -type d -exec sh -ec 'for d; do \
      if [ -L "/$d" ]; then echo "error: ${d#.} is a link to $(readlink "/$d"): add files there"; exit 1; fi; \
      if [ -d "/$d" ]; then chmod $(stat -c %a "/$d") "$d"; chown $(stat -c %u:%g "/$d") "$d"; fi; done' sh {} +

FROM part1

COPY --from=local1 /local/ /

# The root file system is read-only at run time: without this, every start would compile.
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /sandbox

ENTRYPOINT ["python3", "-s", "-P", "-B", "/sandbox/fractal/sandbox/inside/supervisor.py"]
