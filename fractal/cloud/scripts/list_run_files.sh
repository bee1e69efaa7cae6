#!/bin/sh
# $1: the run's name. Prints "SIZE MTIME PATH" of each file, then "manifest" and the manifest.
cd "fractal/runs/$1" 2> /dev/null || exit 0
find . \( -name .lock -o -name .rsync-partial -o -name '.*.lock' -o -name '.manifest.json.*' \) -prune -o \
  -type f -printf '%s %T@ %P\n'
[ ! -e manifest.json ] || { echo manifest; cat manifest.json; }
