/* A stand-in for the driver's libcuda.so.1: one GPU that takes every kernel and runs none.

   Triton's own driver code is compiled against it and calls it. The compute capability is in FRACTAL_CAPABILITY, as 90. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#define TAKES(name) int name() { return 0; }

static int capability(void) { return atoi(getenv("FRACTAL_CAPABILITY")); }

int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "the stand-in knows no errors"; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleLoad(void **module, const char *file) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
    memcpy(data, &pointer, sizeof pointer);
    return 0;
}

int cuGetProcAddress_v2(const char *symbol, void **function, int version, unsigned long long flags, int *status) {
    Dl_info here;
    dladdr((void *)capability, &here);
    *function = dlsym(dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD), symbol);
    return *function ? 0 : 500; /* CUDA_ERROR_NOT_FOUND */
}

/* Of libcudart, before which this library comes by LD_PRELOAD: what torch asks when it looks at a tensor's device. */
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) { /* numbers as in cuda.h's CUdevice_attribute */
    switch (attribute) {
    case 10: *value = 32; break;                   /* warp size */
    case 12: *value = 65536; break;                /* registers of a block */
    case 16: *value = 108; break;                  /* multiprocessors */
    case 75: *value = capability() / 10; break;
    case 76: *value = capability() % 10; break;
    case 97: *value = capability() == 80 ? 166912 : capability() < 90 ? 101376 : 232448; break; /* shared memory, opt-in */
    default: *value = 1;
    }
    return 0;
}

TAKES(cuMemAddressFree) TAKES(cuMemAddressReserve) TAKES(cuMemCreate) TAKES(cuMemGetAllocationGranularity) TAKES(cuMemMap)
TAKES(cuMemRelease) TAKES(cuMemSetAccess) TAKES(cuMemUnmap) TAKES(cuCtxCreate_v2) TAKES(cuDevicePrimaryCtxRetain_v2) TAKES(cuMemExportToShareableHandle)
TAKES(cuInit) TAKES(cuCtxSetCurrent) TAKES(cuCtxGetLimit) TAKES(cuCtxSetLimit) TAKES(cuFuncSetAttribute)
TAKES(cuFuncSetCacheConfig) TAKES(cuLaunchKernel) TAKES(cuLaunchKernelEx) TAKES(cuModuleUnload) TAKES(cuOccupancyMaxActiveClusters)
TAKES(cuPointerGetAttributes) TAKES(cuTensorMapEncodeIm2col) TAKES(cuTensorMapEncodeTiled)
