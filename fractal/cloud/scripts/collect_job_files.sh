#!/bin/sh
# $1: the run's name. Links the files that its job has made or changed, and that are to come home, into the run's folder.
# Nothing to do for a run of the stages.
cd "fractal/exec/$1/work" 2> /dev/null || exit 0
target=$(cd "../../../runs/$1" && pwd)/files
set --
while read -r pattern; do
  [ -z "$pattern" ] || set -- "$@" -o -path "$pattern"
done < ../fetch
[ $# -gt 0 ] || exit 0
shift
mkdir -p "$target" && find . -type f -cnewer ../synced \( "$@" \) -exec cp --parents -lf -t "$target" -- {} +
