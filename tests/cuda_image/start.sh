#!/bin/sh -e
# start.sh CAPABILITY RUNNER: start.py with a stand-in for the driver, which comes before CUDA's own runtime.
gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o /tmp/libcuda.so.1 /check/libcuda.c -ldl
case $1 in 8?) arch=$1 ;; *) arch=${1}a ;; esac
export CUTE_DSL_ARCH="sm_$arch" TRITON_LIBCUDA_PATH=/tmp TORCHINDUCTOR_COMPILE_THREADS=1 PYTHONPATH=/app:/check
LD_PRELOAD=/tmp/libcuda.so.1 exec python /check/start.py "$@"
