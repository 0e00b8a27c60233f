// What operators in CUDA share: grids of blocks, and launches whose errors come back as a status.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../abi.h"

// Declared once for all kernels of a file: CUDA wants one type for the block's dynamic shared memory.
extern __shared__ float4 shared_memory[];

namespace pwcnet {

constexpr int kWarpSize = 32;

inline unsigned blocks_for(int64_t size, int per_block) {
  return static_cast<unsigned>((size + per_block - 1) / per_block);
}

inline int status_of(cudaError_t error) {
  return error == cudaSuccess ? static_cast<int>(kOk) : kCudaError + static_cast<int>(error);
}

// Keeps the arguments out of the deduction of P: they are converted to what the kernel takes.
template <class T>
struct Same {
  using type = T;
};

template <class... P>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           typename Same<P>::type... arguments) {
#ifdef __CUDACC__
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
#else  // tests/cuda_on_cpu
  (void)stream;
  launch_on_cpu(kernel, grid, block, shared_bytes, arguments...);
#endif
  return status_of(cudaGetLastError());
}

}  // namespace pwcnet
