#!/bin/sh
# $1: where a file system should be mounted. Makes Fractal's folder there, of the user that jobs run as.
# Prints "ready", "absent" if nothing is mounted there, or why the folder cannot be written.
mount=$1 folder=$1/fractal
timeout -k 1 10 mountpoint -q "$mount" || { echo absent; exit; }
uid=$(id -u) gid=$(id -g)
[ "$uid" != 0 ] || { uid=1000 gid=1000; }  # jobs never run as root
set -- "$folder/cache" "$folder/inputs" "$folder/models"  # other folders may be root's
owned() {
  others=$(find "$folder" -maxdepth 0 ! -user "$uid" 2> /dev/null) && [ -z "$others" ] &&
    others=$(find "$@" -maxdepth 2 ! -user "$uid" -print -quit 2> /dev/null) && [ -z "$others" ]
}
reason=
if ! mkdir -p "$@" 2> /dev/null || ! owned "$@"; then  # another user made the file system's root, or what is in it
  reason=$({ sudo -n mkdir -p "$@" && sudo -n chown "$uid:$gid" "$folder" && sudo -n chown -hR "$uid:$gid" "$@"; } 2>&1)
fi
mark=$folder/.written-$$
if owned "$@" && reason=$({ : > "$mark" && rm -f "$mark"; } 2>&1); then
  echo ready
else
  printf '%s\n' "$reason" | tail -n 1
fi
