// The CUDA runtime that is linked into this library, for build.py to compare with the driver.

#include <cuda_runtime.h>

// Such as 13000 for CUDA 13.0.
extern "C" int cuda_version() { return CUDART_VERSION; }
