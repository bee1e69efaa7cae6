#!/bin/sh
# Prints how this user reaches the Docker engine: "ok OS/ARCH COMMAND", or "absent", or "no COMMAND: REASON" lines.
command -v docker > /dev/null || { echo absent; exit; }
for docker in docker 'sudo -n docker'; do
  platform=$($docker version --format '{{.Server.Os}}/{{.Server.Arch}}' 2>&1 < /dev/null) &&
    { echo "ok $platform $docker"; exit; }
  printf 'no %s: %s\n' "$docker" "$(printf %s "$platform" | tr '\n' ' ')"
done
