#!/bin/sh
# shellcheck disable=SC2086  # $follow may be empty
# $1: the container, $2: the first byte wanted, counted from 1, $3: "-f" to follow, or "".
follow=$3
docker inspect "$1" > /dev/null 2>&1 || exit 1  # else docker's error message would look like the job's output
docker logs $follow "$1" 2>&1 | stdbuf -o0 tail -c +"$2"  # into a pipe tail alone writes 4096 bytes at a time
