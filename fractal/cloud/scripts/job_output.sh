#!/bin/sh
# shellcheck disable=SC2086  # $docker may be two words, $follow may be empty
# $1: the docker command, $2: the container, $3: the first byte wanted, counted from 1, $4: "-f" to follow, or "".
docker=$1 follow=$4
$docker inspect "$2" > /dev/null 2>&1 || exit 1  # else docker's error message would look like the job's output
$docker logs $follow "$2" 2>&1 | tail -c +"$3"
