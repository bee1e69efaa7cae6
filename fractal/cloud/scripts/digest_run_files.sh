#!/bin/sh
# $1: the run's name. Prints the sha256 of each file.
cd "fractal/runs/$1" || exit 1
find . \( -name .lock -o -name .rsync-partial -o -name '.*.lock' -o -name '.manifest.json.*' \) -prune -o \
  -type f -exec sha256sum {} +
