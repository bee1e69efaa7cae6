ARG BASE=ubuntu:24.04@sha256:0000000000000000000000000000000000000000000000000000000000000000
FROM ${BASE} AS base
# It sets back the times of what a RUN wrote: the same contents are the same layer on any machine.
SHELL ["/bin/sh", "-c", "begun=@$(($(date +%s) - 600)); sh -ec \"$0\" && { find / -xdev -newermt \"$begun\" -exec touch -hcd @0 {} + 2> /dev/null || :; }"]

# Local files: the same owner, modes and times everywhere. Folders that are there already keep their own.
FROM base AS local1
USER 0
SHELL ["/bin/sh", "-ec"]
COPY app/ /local/opt/app
RUN cd /local && chmod -R u=rwX,go=rX . && find . -exec touch -hd @0 {} + \
 && find . -type d -exec sh -ec 'for d; do \
      if [ -L "/$d" ]; then echo "error: ${d#.} is a link to $(readlink "/$d"): add files there"; exit 1; fi; \
      if [ -d "/$d" ]; then chmod $(stat -c %a "/$d") "$d"; chown $(stat -c %u:%g "/$d") "$d"; fi; done' sh {} +

FROM base AS part2

COPY --from=local1 /local/ /

# Two layers.
RUN make -C /opt/app
RUN true || false

ARG FRACTAL_FORCE=

# Local files: the same owner, modes and times everywhere. Folders that are there already keep their own.
FROM part2 AS local2
USER 0
SHELL ["/bin/sh", "-ec"]
COPY ["with space/file one.txt", "/local/opt/a b.txt"]
RUN cd /local && chmod -R u=rwX,go=rX . && find . -exec touch -hd @0 {} + \
 && find . -type d -exec sh -ec 'for d; do \
      if [ -L "/$d" ]; then echo "error: ${d#.} is a link to $(readlink "/$d"): add files there"; exit 1; fi; \
      if [ -d "/$d" ]; then chmod $(stat -c %a "/$d") "$d"; chown $(stat -c %u:%g "/$d") "$d"; fi; done' sh {} +

FROM part2

ARG FRACTAL_FORCE=

# Local files last: an edit of them builds and pushes this layer alone.
COPY --from=local2 /local/ /
