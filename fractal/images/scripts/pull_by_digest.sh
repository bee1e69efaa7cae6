#!/bin/sh
# Pulls an image by digest, compares its id, and only then tags it. The reference by digest is removed again.
# Arguments: the docker command, the reference, the image's name, the accepted ids (words of one argument).
# Prints the id.
docker=$1 reference=$2 name=$3 accepted=$4
trap '$docker rmi "$reference" > /dev/null 2>&1' EXIT
trap exit HUP INT TERM
$docker pull -q "$reference" > /dev/null || exit 1
id=$($docker image inspect -f '{{.Id}}' "$reference") || exit 1
case " $accepted " in
*" $id "*) $docker tag "$reference" "$name" || exit 1 ;;
esac
echo "$id"
