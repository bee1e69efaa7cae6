#!/bin/sh
# shellcheck disable=SC2086,SC2046,SC2069  # $docker may be two words; lists of files are split on purpose
# $1: the docker command, $2: seconds for each step. Runs nvidia-smi in a container with all GPUs.
# Prints "gpu" and a line "DRIVER, NAME" for each GPU; else the reason, and fails.
# The image is made of the instance's own files, so that no registry is needed; NVIDIA's hook puts nvidia-smi into it.
# Where the hook puts the libraries depends on debian_version, and whether they are found on ld.so.conf.
docker=$1 limit=$2 name=fractal-gpu-probe-$$
command -v nvidia-smi > /dev/null || { echo 'no nvidia-smi: there is no NVIDIA driver'; exit 1; }
host=$(timeout "$limit" nvidia-smi --query-gpu=driver_version,name --format=csv,noheader 2>&1)
code=$?
[ $code = 124 ] && host="no end after $limit s"
[ $code = 0 ] || { echo "nvidia-smi: $host"; exit 1; }
if ! $docker image inspect fractal-gpu-probe > /dev/null 2>&1; then
  files='/bin/sh /bin/ls /bin/sed /bin/cat /etc/debian_version /etc/ld.so.conf /etc/ld.so.conf.d'
  libraries=$(ldd /bin/sh /bin/ls "$(command -v sed)" "$(command -v nvidia-smi)" 2> /dev/null |
    grep -o '/[^ :)]*[.]so[^ :)]*')
  opened=$(ldconfig -p 2> /dev/null | grep -oE '/[^ ]*/lib(m|dl|rt|pthread)[.]so[.][0-9]+$')  # by NVIDIA's libraries
  libraries="$libraries $opened"
  tar --hard-dereference -chC / $(printf '%s\n' $files $libraries | sort -u | cut -c 2-) 2> /dev/null |
    $docker import -c 'ENV PATH=/usr/bin:/bin' - fractal-gpu-probe 2>&1 > /dev/null || exit 1
fi
# Docker's client ignores TERM while the container starts; sudo would not pass on a KILL.
bounded=${docker%docker}"timeout -k 3 $limit docker"
inside=$($bounded run --rm --name "$name" --network none --gpus all fractal-gpu-probe nvidia-smi -L 2>&1)
code=$?
[ $code = 0 ] && { echo gpu; echo "$host"; exit 0; }
echo "$inside"
case $code in
  124 | 137)
    echo "no end after $limit s"
    $bounded rm -f "$name" > /dev/null 2>&1 ;;
esac
exit 1
