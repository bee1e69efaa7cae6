#!/bin/sh
# Removes sandboxes whose job does not exist: a client was killed while it started the job.
{
  docker ps -a --filter name=fractal-sandbox- --format '{{.Names}}'
  docker volume ls -q --filter name=fractal-sandbox-
} | sort -u | while read -r name; do
  docker inspect "fractal-job-${name#fractal-sandbox-}" > /dev/null 2>&1 && continue
  docker rm -fv "$name" > /dev/null 2>&1 < /dev/null
  docker volume rm -f "$name" > /dev/null 2>&1 < /dev/null
done
