#!/bin/sh
# shellcheck disable=SC2086,SC2329  # $sudo may be two words, or none; `clean` is a trap's
# Runs `docker build`. $1: "sudo -n" or "", $2: a new folder; $3 and $4: bytes of two archives on standard input, of the
# secrets and, compressed, of Dockerfile and context; then come heartbeats, and after $5 seconds without one the build
# ends. The rest: environment and words of the docker command, with paths in the folder.
# Prints the builder's output, then "fractal-image ID". The secrets lie in memory. Nothing of all this stays.
sudo=$1 new_folder=$2 secrets_bytes=$3 context_bytes=$4 heartbeat_timeout_s=$5
shift 5
umask 077
memory=/dev/shm
[ -w $memory ] || memory=/run/user/$(id -u)
secrets='' folder='' build=''

end_build() {
  for signal in TERM KILL; do # a builder that has only just begun its step ignores TERM
    $sudo kill -s $signal -- "-$build" 2> /dev/null || return
    for _ in 1 2 3 4 5 6; do
      sleep 0.5
      [ -d "/proc/$build" ] || return
    done
  done
}
clean() {
  [ -z "$build" ] || end_build
  rm -rf "$secrets" "$folder"
}
trap clean EXIT
trap exit HUP INT TERM

mkdir "$new_folder" || exit 1
folder=$new_folder
secrets=$(mktemp -d "$memory/fractal-build-XXXXXX") || exit 1
exec 3<&0
head -c "$secrets_bytes" <&3 | tar -xf - -C "$secrets" || exit 1
head -c "$context_bytes" <&3 | tar -xzpf - -C "$folder" || exit 1
ln -s "$secrets" "$folder/secrets" || exit 1
# A session of its own: sudo passes on no signal that comes from its own group.
setsid $sudo env "$@" < /dev/null 3<&- &
build=$!
(
  while beat=$(timeout "$heartbeat_timeout_s" head -c 1 <&3) && [ -n "$beat" ]; do :; done
  end_build
) > /dev/null 2>&1 &
wait "$build"
code=$?
build=''
[ "$code" != 0 ] || echo "fractal-image $($sudo cat "$folder/id")"
exit "$code"
