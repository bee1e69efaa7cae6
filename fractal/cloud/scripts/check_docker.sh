#!/bin/sh
# shellcheck disable=SC2086  # $docker may be two words: sudo docker
# $1: seconds for an answer, $2: seconds for the start of the engine.
# Prints "answers docker" if the user can call Docker, "joined" if the user was added to the group docker and may call it
# from the next login on, "started" if the engine was started, "absent" without Docker; else the reasons.
# An engine that is still starting is waited for, and not called started.
limit=$1 repair=$2 left=60
command -v docker > /dev/null || { echo absent; exit 0; }
version() { timeout -k 3 "$limit" $docker version 2>&1 < /dev/null; }
try() {
  docker=docker
  version > /dev/null && { echo 'answers docker'; exit 0; }
  docker='sudo -n docker'
  version > /dev/null && sudo -n usermod -aG docker "$(id -un)" 2>&1 && { echo joined; exit 0; }
}
try
while [ $left -gt 0 ] && [ "$(systemctl is-active docker 2> /dev/null)" = activating ]; do
  sleep 1
  left=$((left - 1))
  try
done
timeout "$repair" sudo -n systemctl start docker 2>&1 < /dev/null && echo started && try
for docker in docker 'sudo -n docker'; do
  output=$(version)
  if [ $? = 124 ]; then echo "$docker version: no end after $limit s"; else printf '%s\n' "$output" | tail -n 1; fi
done
