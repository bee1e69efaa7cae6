#!/bin/sh
# Prints "direct PROGRAM" or "sudo PROGRAM" for the first docker command that reaches the engine and can use BuildKit:
# clients since 23 need the plugin buildx, older ones have it built in. Else a line "lacks PROGRAM" for each, or nothing.
call() {
  how=$1
  shift
  if [ "$how" = sudo ]; then sudo -n "$@" < /dev/null; else "$@" < /dev/null; fi
}
IFS=:
for how in direct sudo; do
  for folder in $PATH; do
    program=$folder/docker
    [ -x "$program" ] || continue
    version=$(call "$how" "$program" version --format '{{.Client.Version}}' 2> /dev/null) || continue
    if call "$how" "$program" buildx version > /dev/null 2>&1 || [ "${version%%.*}" -lt 23 ] 2> /dev/null; then
      echo "$how $program"
      exit
    fi
    echo "lacks $program"
  done
done
