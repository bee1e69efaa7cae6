#!/bin/sh
# shellcheck disable=SC2086  # $follow may be empty
# $1: the container, $2: the first byte wanted, counted from 1, $3: "-f" to follow, or "".
# Its standard input ends with the client: then this ends, also while the job prints nothing.
follow=$3
docker inspect "$1" > /dev/null 2>&1 || exit 1  # else docker's error message would look like the job's output
exec 3<&0
{ cat <&3; kill 0; } > /dev/null 2>&1 &
docker logs $follow "$1" 2>&1 3<&- < /dev/null |
  stdbuf -o0 tail -c +"$2"  # into a pipe tail alone writes 4096 bytes at a time
