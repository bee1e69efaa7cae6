#!/bin/sh
# shellcheck disable=SC2086  # $docker may be two words: sudo docker
# $1: seconds for an answer, $2: seconds for the start of the engine.
# Prints "answers DOCKER" with the command that works, "repaired" if the engine was started, "absent" without Docker.
# An engine that is still starting is waited for, and not called repaired.
limit=$1 repair=$2 left=60
command -v docker > /dev/null || { echo absent; exit 0; }
version() { timeout -k 3 "$limit" $docker version 2>&1 < /dev/null; }
try() {
  for docker in docker 'sudo -n docker'; do version > /dev/null && { echo "answers $docker"; exit 0; }; done
}
try
while [ $left -gt 0 ] && [ "$(systemctl is-active docker 2> /dev/null)" = activating ]; do
  sleep 1
  left=$((left - 1))
  try
done
timeout "$repair" sudo -n systemctl start docker 2>&1 < /dev/null && echo repaired && try
for docker in docker 'sudo -n docker'; do
  output=$(version)
  if [ $? = 124 ]; then echo "$docker version: no end after $limit s"; else printf '%s\n' "$output" | tail -n 1; fi
done
