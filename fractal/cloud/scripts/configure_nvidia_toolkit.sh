#!/bin/sh
# shellcheck disable=SC2086  # $docker may be two words: sudo docker
# $1: the docker command, $2: seconds for the restart. Fails with "absent" without the toolkit, with "busy" while
# containers run: the engine's restart would end them.
docker=$1 limit=$2
command -v nvidia-ctk > /dev/null || { echo absent; exit 1; }
[ -z "$($docker ps -q)" ] || { echo busy; exit 1; }
sudo -n nvidia-ctk runtime configure --runtime=docker 2>&1 && timeout "$limit" sudo -n systemctl restart docker 2>&1
