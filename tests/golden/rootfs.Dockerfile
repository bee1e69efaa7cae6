FROM scratch AS base
ADD base.tar.xz /
# It sets back the times of what a RUN wrote: the same contents are the same layer on any machine.
SHELL ["/bin/sh", "-c", "begun=@$(($(date +%s) - 600)); sh -ec \"$0\" && { find / -xdev -newermt \"$begun\" -exec touch -hcd @0 {} + 2> /dev/null || :; }"]

FROM base

RUN true
