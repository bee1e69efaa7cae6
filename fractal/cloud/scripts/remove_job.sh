#!/bin/sh
# shellcheck disable=SC2086  # $docker may be two words: sudo docker
# $1: the docker command, $2: the job's id. Removes its containers and its volume.
docker=$1
$docker rm -fv "fractal-job-$2" "fractal-sandbox-$2" > /dev/null 2>&1
for _ in 1 2 3 4 5 6 7 8 9 10; do $docker volume rm -f "fractal-sandbox-$2" > /dev/null 2>&1 && break; sleep 0.2; done
! $docker inspect "fractal-job-$2" > /dev/null 2>&1
