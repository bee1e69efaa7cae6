#!/bin/sh
# Pulls an image by digest, which the engine checks, and only then tags it. The reference by digest is removed again.
# Arguments: the docker command, the reference, the image's name.
docker=$1 reference=$2 name=$3
trap '$docker rmi "$reference" > /dev/null 2>&1' EXIT
trap exit HUP INT TERM
$docker pull -q "$reference" > /dev/null || exit 1
$docker tag "$reference" "$name"
