#!/bin/sh
# $1: a folder's path without the processor. Makes the folder, with those that other folders are mounted on in a job's
# container, which Docker could not make on a file system that does not obey root; prints its path.
processor=$(grep -E '^(model name|flags|Features|CPU (implementer|architecture|variant|part))' /proc/cpuinfo |
  sort -u | sha256sum | cut -c 1-8)
cache=${1%/kernels/*} folder=$1-$processor
mkdir -p "$cache/huggingface" "$cache/fractal" "$folder/huggingface" "$folder/fractal" && echo "$folder"
