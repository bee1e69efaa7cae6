#!/bin/sh
# $1: seconds to wait. Prints cloud-init's status and "code N"; 124 if it is not done; "absent" without cloud-init.
command -v cloud-init > /dev/null || { echo absent; exit 0; }
timeout "$1" cloud-init status --wait > /dev/null 2>&1
code=$?
[ $code = 124 ] || cloud-init status --long 2>&1
echo "code $code"
