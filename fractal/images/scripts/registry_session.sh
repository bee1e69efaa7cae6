#!/bin/sh
# Runs a registry on this host's loopback for as long as the SSH connection lives. Arguments: the volume of its blobs,
# and the seconds without a heartbeat after which the connection counts as dead. Standard input: the docker command,
# the registry's image and the container's name, a line each; then heartbeats. Prints "registry port PORT" or
# "registry failed REASON".
volume=$1 heartbeat_timeout_s=$2
read -r docker && read -r image && read -r name || exit 0

# sudo may read standard input on behalf of its command, and would take the heartbeats: < /dev/null.
run_docker() { $docker "$@" < /dev/null; }

remove_registry() {
  run_docker rm -fv "$name" > /dev/null 2>&1
  # This connection's sshd: engine 20.10 leaves the sockets of a cancelled push open, and ssh would wait for them.
  kill "$PPID"
}

# Registries of connections that were killed: the label holds the process id of the session script.
for old in $(run_docker ps -aq --filter label=fractal.keeper); do
  session=$(run_docker inspect -f '{{index .Config.Labels "fractal.keeper"}}' "$old")
  [ -d "/proc/$session" ] || run_docker rm -fv "$old" > /dev/null 2>&1
done

trap remove_registry EXIT
trap exit HUP INT TERM
if ! output=$(run_docker run -d --rm --name "$name" --label "fractal.keeper=$$" -p 127.0.0.1::5000 \
  -v "$volume:/var/lib/registry" --cap-drop ALL --security-opt no-new-privileges --read-only "$image" 2>&1) ||
  ! output=$(run_docker port "$name" 5000/tcp 2>&1); then
  printf 'registry failed %s\n' "$(printf %s "$output" | tr '\n' ' ')"
  exit 1
fi
echo "registry port ${output##*:}"
while beat=$(timeout "$heartbeat_timeout_s" head -c 1) && [ -n "$beat" ]; do :; done
