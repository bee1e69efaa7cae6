#!/bin/sh
# $1: seconds for each answer, the others: addresses. Asks for all at once, and prints "clock UNIX-SECONDS", "disk KIB"
# (free for the engine's images), "image REPOSITORY" of each of them, and for each address "address ADDRESS ok", or the
# reason why it is not reached. Any answer counts as reached, also one that asks for a password.
limit=$1
shift
echo "clock $(date +%s)"
folder=/var/lib/docker
[ -d "$folder" ] || folder=/
echo "disk $(df -Pk "$folder" | awk 'NR == 2 {print $4}')"
reach() {
  if command -v curl > /dev/null; then
    output=$(curl -sSI -o /dev/null -m "$limit" "$1" 2>&1)
  else
    host=${1#*://} port=443
    case $1 in http:*) port=80 ;; esac
    host=${host%%/*}
    case $host in *:*) port=${host##*:} host=${host%:*} ;; esac
    # shellcheck disable=SC2016  # for bash to expand
    output=$(timeout -k 1 "$limit" bash -c ': < "/dev/tcp/$1/$2"' bash "$host" "$port" 2>&1)
  fi
  code=$?
  [ $code = 0 ] && output=ok
  [ $code = 124 ] && output="no answer within $limit s"
  echo "address $1 $(printf '%s\n' "${output:-no reason given}" | head -n 1)"
}
timeout -k 1 "$limit" docker image ls --format 'image {{.Repository}}' 2> /dev/null < /dev/null &
for address; do reach "$address" < /dev/null & done
wait
