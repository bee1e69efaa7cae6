# The sandbox: Python's standard library and the judge, nothing else. `python -m fractal.images.build` builds it with the
# sources of fractal/sandbox as context and names it by their hash. What walls it in are options of `docker run`; the
# supervisor starts as root because each candidate gets a user of its own.
ARG BASE=debian:bookworm-slim
FROM ${BASE}
RUN command -v python3 > /dev/null || { apt-get update && apt-get install -y --no-install-recommends python3; } \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*
ENV LANG=C.UTF-8
COPY fractal/ /sandbox/fractal/
# The root file system is read-only at run time: without this, every start would compile.
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /sandbox
# Not -I: PYTHONHASHSEED has to be heard, so that a label does not depend on the order of a set.
ENTRYPOINT ["python3", "-s", "-P", "-B", "/sandbox/fractal/sandbox/supervisor.py"]
