#!/bin/sh
# $1: the run's name. Prints the sha256 and the path of each file, ended by NUL.
cd "fractal/runs/$1" || exit 1
find . \( -name .lock -o -name .rsync-partial -o -name '.*.lock' -o -name '.manifest.json.*' \) -prune -o \
  -type f -exec sha256sum -z {} +
