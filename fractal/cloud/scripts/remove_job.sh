#!/bin/sh
# $1: the job's id. Removes its containers, its volume and its place in the queue.
docker rm -fv "fractal-job-$1" "fractal-sandbox-$1" > /dev/null 2>&1
for _ in 1 2 3 4 5 6 7 8 9 10; do docker volume rm -f "fractal-sandbox-$1" > /dev/null 2>&1 && break; sleep 0.2; done
rm -f "fractal/queue/$1"
! docker inspect "fractal-job-$1" > /dev/null 2>&1
