#!/bin/sh
# shellcheck disable=SC2086  # $sudo may be two words, or none
# Makes a base image of Debian's packages. $1: "sudo -n" or "", $2: the docker program, $3: the image's name, $4: Debian's
# suite, $5: mmdebstrap's variant, $6: packages, $7: pattern of what is left out, $8: mask of modes. Standard input: an
# archive with filter.py and, where this network asks for them, apt (settings), ca and sources.
sudo=$1 docker=$2 name=$3 suite=$4 variant=$5 packages=$6 left_out=$7 modes=$8
umask 077
settings='' folder=''
trap 'rm -rf "$settings" "$folder"' EXIT
trap exit HUP INT TERM
settings=$(mktemp -d /dev/shm/fractal-base-XXXXXX) && folder=$(mktemp -d) || exit 1
tar -xf - -C "$settings" || exit 1
if ! command -v mmdebstrap > /dev/null || [ ! -e /usr/share/keyrings/debian-archive-keyring.gpg ]; then
  sudo -n env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=120 \
    install -y mmdebstrap debian-archive-keyring > /dev/null 2>&1 < /dev/null
fi
command -v mmdebstrap > /dev/null || { echo 'E: there is no mmdebstrap, and apt-get does not install it'; exit 1; }
hooks=/usr/share/mmdebstrap/hooks/merged-usr # without it Debian's usrmerge brings 47 MB of perl along
set --
[ ! -d $hooks ] || { set -- "--hook-dir=$hooks" && packages="$packages,usr-is-merged"; }
if [ -e "$settings/apt" ]; then
  # Where sources come from, mmdebstrap says itself. The user _apt may not read the certificates here.
  sed -i "/^Dir::Etc/d; s#/run/secrets/#$settings/#" "$settings/apt"
  echo 'APT::Sandbox::User "root";' >> "$settings/apt"
  set -- "$@" "--aptopt=$settings/apt"
fi
start=$(date +%s)
whole=$folder/whole.tar sources=$settings/sources
[ -e "$sources" ] || sources=''
sudo -n mmdebstrap "--variant=$variant" "--include=$packages" "$@" "$suite" "$whole" $sources 2>&1 < /dev/null || exit 1
sudo -n chmod 644 "$whole" || exit 1
python3 "$settings/filter.py" "$whole" "$left_out" "$modes" "$start" > "$folder/filtered.tar" || exit 1
$sudo "$docker" import - "$name" < "$folder/filtered.tar" > /dev/null
