#!/bin/sh
# $1: the job's name. Makes the folders of a job with the user's project. Prints the user, the home folder, "exists" if
# the job has a working folder or "new", and the names of up to three other jobs, the newest first.
mkdir -p "fractal/exec/$1/source" "fractal/runs/$1" fractal/inputs fractal/models fractal/src || exit 1
echo "$(id -u):$(id -g)"
pwd
if [ -d "fractal/exec/$1/work" ]; then echo exists; else echo new; fi
cd fractal/exec || exit 1
# shellcheck disable=SC2012  # names of runs are letters, digits, "-", "_" and "."
ls -t | while read -r folder; do
  [ "$folder" = "$1" ] || [ ! -d "$folder/work" ] || echo "$folder"
done | head -n 3
