#!/bin/sh
# shellcheck disable=SC2086  # $sudo may be two words, or none
# Pushes images in the background, and removes these names of theirs. $1: "sudo -n" or "", $2: the docker program; names.
sudo=$1 docker=$2
shift 2
{
  for name in "$@"; do
    $sudo "$docker" push "$name"
    $sudo "$docker" rmi "$name"
  done
} > /tmp/fractal-layers.log 2>&1 < /dev/null &
