#!/bin/sh
# Prints the first of the given images that the engine has. Arguments: the docker command, images.
docker=$1
shift
for image in "$@"; do
  $docker image inspect "$image" > /dev/null 2>&1 && { echo "$image"; exit; }
done
