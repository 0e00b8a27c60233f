// Bilinear warping in CUDA, and its gradient; defined by `warp` in model/operators.py.

#include <cstddef>
#include <cstdint>

#include "../warp.h"
#include "launch.h"

namespace pwcnet {
namespace {

// Threads along the channels in the warping kernels, whose blocks cover 32 successive pixels.
constexpr int kChannelThreads = 8;

// The four pixels around the position that a pixel's flow points to: their offsets, bilinear weights, and the weights'
// derivatives by the position. All are 0 for a pixel outside the image, so that every offset may be read.
struct Taps {
  int at[4];
  float weight[4], by_x[4], by_y[4];
};

__device__ __forceinline__ Taps find_taps(const float* __restrict__ flow, int pixel, int height, int width) {
  Taps taps = {};
  const int plane = height * width;
  const float x = pixel % width + flow[pixel];
  const float y = pixel / width + flow[static_cast<int64_t>(plane) + pixel];
  // Also false for NaN.
  if (!(x >= 0 && x <= width - 1 && y >= 0 && y <= height - 1)) return taps;
  const int left = static_cast<int>(x), top = static_cast<int>(y);
  const float right_part = x - left, lower_part = y - top;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool right = i % 2, lower = i / 2;
    // On the last column or row the tap beyond has weight 0 and counts as zero.
    if ((right && left + 1 >= width) || (lower && top + 1 >= height)) continue;
    const float along_x = right ? right_part : 1 - right_part;
    const float along_y = lower ? lower_part : 1 - lower_part;
    taps.at[i] = (top + lower) * width + left + right;
    taps.weight[i] = along_x * along_y;
    taps.by_x[i] = right ? along_y : -along_y;
    taps.by_y[i] = lower ? along_x : -along_x;
  }
  return taps;
}

__global__ void __launch_bounds__(kWarpSize* kChannelThreads)
    warp_forward_kernel(const float* __restrict__ features, const float* __restrict__ flow, float* __restrict__ result,
                        int channels, int height, int width) {
  const int plane = height * width;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x;
  if (place >= plane) return;
  const int pixel = static_cast<int>(place);
  const int64_t sample = static_cast<int64_t>(blockIdx.y) * plane;
  const Taps taps = find_taps(flow + 2 * sample, pixel, height, width);
#pragma unroll 4
  for (int channel = threadIdx.y; channel < channels; channel += kChannelThreads) {
    const int64_t at = sample * channels + static_cast<int64_t>(channel) * plane;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += taps.weight[i] * features[at + taps.at[i]];
    result[at + pixel] = sum;
  }
}

struct FlowSums {
  float x[kChannelThreads][kWarpSize], y[kChannelThreads][kWarpSize];
};

// `feature_gradient` must be zero before. Any number of pixels may point to one position, hence the atomic
// additions; the sums for the flow have a fixed order.
__global__ void __launch_bounds__(kWarpSize* kChannelThreads)
    warp_backward_kernel(const float* __restrict__ features, const float* __restrict__ flow,
                         const float* __restrict__ gradient, float* __restrict__ feature_gradient,
                         float* __restrict__ flow_gradient, int channels, int height, int width) {
  auto& sums = *reinterpret_cast<FlowSums*>(shared_memory);
  const int plane = height * width;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x;
  const int64_t sample = static_cast<int64_t>(blockIdx.y) * plane;
  float sum_x = 0, sum_y = 0;
  if (place < plane) {
    const int pixel = static_cast<int>(place);
    const Taps taps = find_taps(flow + 2 * sample, pixel, height, width);
#pragma unroll 2
    for (int channel = threadIdx.y; channel < channels; channel += kChannelThreads) {
      const int64_t at = sample * channels + static_cast<int64_t>(channel) * plane;
      const float upstream = gradient[at + pixel];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float product = upstream * features[at + taps.at[i]];
        sum_x += taps.by_x[i] * product;
        sum_y += taps.by_y[i] * product;
        if (taps.weight[i] != 0) {
          atomicAdd(feature_gradient + at + taps.at[i], taps.weight[i] * upstream);
        }
      }
    }
  }
  sums.x[threadIdx.y][threadIdx.x] = sum_x;
  sums.y[threadIdx.y][threadIdx.x] = sum_y;
  __syncthreads();
  if (threadIdx.y != 0 || place >= plane) return;
  for (int i = 1; i < kChannelThreads; ++i) {
    sum_x += sums.x[i][threadIdx.x];
    sum_y += sums.y[i][threadIdx.x];
  }
  flow_gradient[2 * sample + place] = sum_x;
  flow_gradient[2 * sample + plane + place] = sum_y;
}

dim3 warp_grid(const Sizes& sizes) { return dim3(blocks_for(sizes[kH] * sizes[kW], kWarpSize), sizes[kN]); }

}  // namespace

// features, flow -> warped
PWCNET_OPERATOR(Warp) {
  Sizes sizes;
  if (const Status status = check(call, {kFeatures, kFlow, kWarped}, &sizes)) return status;
  if (sizes[kN] == 0 || sizes[kH] == 0 || sizes[kW] == 0) return kOk;
  return launch(warp_forward_kernel, warp_grid(sizes), dim3(kWarpSize, kChannelThreads), 0, call.stream,
                call.data<float>(0), call.data<float>(1), call.data<float>(2), sizes[kC], sizes[kH], sizes[kW]);
}

// features, flow, gradient of warped -> feature_gradient, flow_gradient
PWCNET_OPERATOR(WarpGradient) {
  Sizes sizes;
  if (const Status status = check(call, {kFeatures, kFlow, kGradient, kFeatureGradient, kFlowGradient}, &sizes)) {
    return status;
  }
  if (sizes[kN] == 0 || sizes[kH] == 0 || sizes[kW] == 0) return kOk;
  const size_t elements = static_cast<size_t>(sizes[kN]) * sizes[kC] * sizes[kH] * sizes[kW];
  const cudaError_t error =
      cudaMemsetAsync(call.params[3], 0, elements * sizeof(float), static_cast<cudaStream_t>(call.stream));
  if (error != cudaSuccess) return status_of(error);
  return launch(warp_backward_kernel, warp_grid(sizes), dim3(kWarpSize, kChannelThreads), sizeof(FlowSums), call.stream,
                call.data<float>(0), call.data<float>(1), call.data<float>(2), call.data<float>(3), call.data<float>(4),
                sizes[kC], sizes[kH], sizes[kW]);
}

}  // namespace pwcnet
