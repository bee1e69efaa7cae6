#!/bin/sh
# shellcheck disable=SC2086  # $sudo may be two words, or none
# Starts a registry on the loopback unless it runs, and prints its address. $1: "sudo -n" or "", $2: the docker program,
# $3: the registry's image, $4: the folder of its blobs.
sudo=$1 docker=$2 image=$3 folder=$4 name=fractal-layers
mkdir -p "$folder" || exit 1
if [ "$($sudo "$docker" inspect -f '{{.State.Running}}' $name 2> /dev/null)" != true ]; then
  $sudo "$docker" rm -f $name > /dev/null 2>&1
  # As the folder's owner: a network's file system lets root write nothing.
  $sudo "$docker" run -d --name $name --user "$(id -u):$(id -g)" -p 127.0.0.1::5000 -v "$folder:/var/lib/registry" \
    --cap-drop ALL --security-opt no-new-privileges --read-only "$image" > /dev/null || exit 1
fi
for _ in $(seq 50); do
  $sudo "$docker" logs $name 2>&1 | grep -q 'listening on' && break
  sleep 0.2
done
$sudo "$docker" port $name 5000/tcp
