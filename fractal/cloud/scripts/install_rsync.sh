#!/bin/sh
# $1: seconds for one call of apt-get. Prints "there", or "repaired" if rsync was installed; else the reason, and fails.
limit=$1
command -v rsync > /dev/null && { echo there; exit 0; }
apt() {
  timeout "$limit" sudo -n env DEBIAN_FRONTEND=noninteractive \
    apt-get -q -o DPkg::Lock::Timeout=120 "$@" 2>&1 < /dev/null
}
output=$(apt install -y rsync) || { apt update > /dev/null; output=$(apt install -y rsync); }
command -v rsync > /dev/null && { echo repaired; exit 0; }
printf '%s\n' "$output" | grep '^E:' || printf '%s\n' "$output" | tail -n 1
exit 1
