// Bias and LeakyReLU of a convolution's result in CUDA, and their gradients.
//
// MindSpore needs three kernels for them and ten for the gradients, and a training step waits for the host to start
// kernels (launch/README.md). Numbers are float32 or float16; all arithmetic is in float32.

#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "launch.h"

namespace pwcnet {
namespace {

constexpr int kForwardThreads = 256;
constexpr int kPerThread = 4;  // pixels
constexpr int kBackwardThreads = 1024;

__device__ __forceinline__ float load(const float* at) { return *at; }
__device__ __forceinline__ float load(const __half* at) { return __half2float(*at); }
__device__ __forceinline__ void store(float* at, float value) { *at = value; }
__device__ __forceinline__ void store(__half* at, float value) { *at = __float2half(value); }

template <class T>
__global__ void __launch_bounds__(kForwardThreads)
    activate_kernel(const T* __restrict__ x, const float* __restrict__ bias, T* __restrict__ y, int channels,
                    int plane) {
  const int64_t offset = (static_cast<int64_t>(blockIdx.z) * channels + blockIdx.y) * plane;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kForwardThreads * kPerThread + threadIdx.x;
  const float shift = bias[blockIdx.y];
  float sums[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {  // apart from the stores, so that all loads start at once
    const int64_t pixel = first + i * kForwardThreads;
    if (pixel < plane) sums[i] = load(x + offset + pixel) + shift;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t pixel = first + i * kForwardThreads;
    if (pixel < plane) store(y + offset + pixel, sums[i] > 0 ? sums[i] : kLeakySlope * sums[i]);
  }
}

// A block has a channel for itself, so that the sums for the bias have a fixed order.
template <class T>
__global__ void __launch_bounds__(kBackwardThreads)
    activate_gradient_kernel(const T* __restrict__ y, const T* __restrict__ gradient, T* __restrict__ x_gradient,
                             float* __restrict__ bias_gradient, int samples, int channels, int plane) {
  float* sums = reinterpret_cast<float*>(shared_memory);
  float sum = 0;
  for (int sample = 0; sample < samples; ++sample) {
    const int64_t offset = (static_cast<int64_t>(sample) * channels + blockIdx.x) * plane;
#pragma unroll 4
    for (int64_t pixel = threadIdx.x; pixel < plane; pixel += kBackwardThreads) {
      const float upstream = load(gradient + offset + pixel);
      const float value = load(y + offset + pixel) > 0 ? upstream : kLeakySlope * upstream;
      store(x_gradient + offset + pixel, value);
      sum += value;
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    for (int i = kWarpSize; i < kBackwardThreads; i += kWarpSize) sum += sums[threadIdx.x + i];
    sums[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kWarpSize; ++i) sum += sums[i];
  bias_gradient[blockIdx.x] = sum;
}

// The dtype that a call's images must have: that of the first one, unless it is none of those there are kernels for.
const char* image_dtype(const Call& call) {
  return call.count > 0 && std::strcmp(call.dtypes[0], "float16") == 0 ? "float16" : "float32";
}

template <class T>
int activate(const Call& call, const Sizes& sizes) {
  const int64_t plane = sizes[kH] * sizes[kW];
  const dim3 grid(blocks_for(plane, kForwardThreads * kPerThread), sizes[kC], sizes[kN]);
  return launch(activate_kernel<T>, grid, dim3(kForwardThreads), 0, call.stream, call.data<T>(0), call.data<float>(1),
                call.data<T>(2), sizes[kC], plane);
}

template <class T>
int activate_gradient(const Call& call, const Sizes& sizes) {
  return launch(activate_gradient_kernel<T>, dim3(sizes[kC]), dim3(kBackwardThreads), kBackwardThreads * sizeof(float),
                call.stream, call.data<T>(0), call.data<T>(1), call.data<T>(2), call.data<float>(3), sizes[kN],
                sizes[kC], sizes[kH] * sizes[kW]);
}

}  // namespace

// x, bias -> y
PWCNET_OPERATOR(BiasActivation) {
  const char* dtype = image_dtype(call);
  Sizes sizes;
  if (const Status status = check(
          call, {{"x", dtype, 4, {kN, kC, kH, kW}}, {"bias", "float32", 1, {kC}}, {"y", dtype, 4, {kN, kC, kH, kW}}},
          &sizes)) {
    return status;
  }
  if (sizes[kN] == 0 || sizes[kC] == 0 || sizes[kH] == 0 || sizes[kW] == 0) return kOk;
  return std::strcmp(dtype, "float16") == 0 ? activate<__half>(call, sizes) : activate<float>(call, sizes);
}

// y, gradient of y -> x_gradient, bias_gradient
PWCNET_OPERATOR(BiasActivationGradient) {
  const char* dtype = image_dtype(call);
  Sizes sizes;
  if (const Status status = check(call,
                                  {{"y", dtype, 4, {kN, kC, kH, kW}},
                                   {"gradient", dtype, 4, {kN, kC, kH, kW}},
                                   {"x_gradient", dtype, 4, {kN, kC, kH, kW}},
                                   {"bias_gradient", "float32", 1, {kC}}},
                                  &sizes)) {
    return status;
  }
  if (sizes[kC] == 0) return kOk;
  return std::strcmp(dtype, "float16") == 0 ? activate_gradient<__half>(call, sizes)
                                            : activate_gradient<float>(call, sizes);
}

}  // namespace pwcnet
