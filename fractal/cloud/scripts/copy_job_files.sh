#!/bin/sh
# $1: the job's name, then patterns of the files that come home. Makes the job's working folder a copy of the project's
# files; in one that is there, files that are newer in the project are replaced.
cd "fractal/exec/$1" || exit 1
shift
printf '%s\n' "$@" > fetch
if [ -d work ]; then
  cp -au source/. work/
else
  rm -rf new && cp -a source new && touch synced && mv new work
fi
