#!/bin/sh
# $1: seconds for one call of apt-get. Installs BuildKit's plugin of the docker command, as Docker or Ubuntu calls it.
limit=$1
apt() {
  timeout "$limit" sudo -n env DEBIAN_FRONTEND=noninteractive \
    apt-get -q -o DPkg::Lock::Timeout=120 "$@" > /dev/null 2>&1 < /dev/null
}
install() { apt install -y docker-buildx-plugin || apt install -y docker-buildx; }
install || { apt update; install; }
