# syntax=docker/dockerfile:1
ARG V=1
FROM debian:12 AS build
RUN make \
  FROM=x



FROM --platform=linux/amd64 \
  debian:12 AS base
COPY --from=build /x /x
# It sets back the times of what a RUN wrote: the same contents are the same layer on any machine.
SHELL ["/bin/sh", "-c", "begun=@$(($(date +%s) - 600)); sh -ec \"$0\" && { find / -xdev -newermt \"$begun\" -exec touch -hcd @0 {} + 2> /dev/null || :; }"]

FROM base

RUN true
