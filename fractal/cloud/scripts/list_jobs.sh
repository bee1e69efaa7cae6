#!/bin/sh
# shellcheck disable=SC2086  # $ids is a list
# Prints [labels, state] of each job's container, as JSON lines.
ids=$(docker ps -aq --filter label=fractal.job) || exit 1
[ -z "$ids" ] && exit
# A container may be removed meanwhile: docker then prints an empty line for it, and fails.
docker inspect --format '[{{json .Config.Labels}},{{json .State}}]' $ids | grep . || :
