// The cost volume with its LeakyReLU in CUDA, and its gradient; defined by `cost_volume` in model/operators.py.

#include <cstddef>
#include <cstdint>

#include "../cost_volume.h"
#include "launch.h"

namespace pwcnet {
namespace {

// A block works on a tile of 16 x 8 pixels, each of its warps on the whole tile: 8 rows of 4 quads.
// Wider tiles would idle at the coarse levels, where images are 7 to 28 pixels wide.
constexpr int kTileWidth = 16;
constexpr int kTileHeight = 8;
constexpr int kQuads = kTileWidth / 4;
// Columns kept on either side of a tile: the search range, a whole quad.
constexpr int kHalo = kSearchRange;
constexpr int kWideQuads = kQuads + 2 * kHalo / 4;
// Row lengths in shared memory. The eight lanes that are served together read one quad of eight
// successive rows: these lengths (20 and 28 floats) put the eight quads into different banks.
constexpr int kRow = kTileWidth + 4;
constexpr int kWideRow = kTileWidth + 2 * kHalo + 4;

// Channels that the forward pass brings to shared memory at a time: 19 KB of them, which
// leaves room for several blocks on a multiprocessor.
constexpr int kStage = 8;
// Blocks of the forward pass per multiprocessor: while one waits for its loads, others compute.
constexpr int kForwardBlocks = 3;
// The backward pass holds kPerWarp channels in each thread's registers, so that a weight read from
// shared memory serves as many products.
constexpr int kPerWarp = 4;
constexpr int kWarps = 4;

struct alignas(16) Quad {
  float value[4];
};

// Pixels x to x + 3 of a row, zero outside it. `vector` says that rows are whole quads and x is a
// multiple of four, so that one load does it.
__device__ __forceinline__ Quad load_quad(const float* __restrict__ row, int x, int width, bool vector) {
  Quad result = {};
  if (vector) {
    if (x >= 0 && x < width) result = *reinterpret_cast<const Quad*>(row + x);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (x + i >= 0 && x + i < width) result.value[i] = row[x + i];
    }
  }
  return result;
}

__device__ __forceinline__ void store_quad(float* __restrict__ row, int x, int width, bool vector, const Quad& values) {
  if (vector) {
    if (x < width) *reinterpret_cast<Quad*>(row + x) = values;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (x + i < width) row[x + i] = values.value[i];
    }
  }
}

// The whole block brings a window of several channels to shared memory, zeros outside the image
// and for channels that do not exist.
template <int kThreads, int kColumns, int kCount, int kRows, int kLength>
__device__ __forceinline__ void load_window(float (&window)[kCount][kRows][kLength], const float* __restrict__ planes,
                                            int channels, int top, int left, int height, int width, bool vector) {
#pragma unroll 1  // Unrolled, its indices fill the registers that the sums need.
  for (int i = threadIdx.y * kWarpSize + threadIdx.x; i < kCount * kRows * kColumns; i += kThreads) {
    const int column = 4 * (i % kColumns), row = i / kColumns % kRows;
    const int channel = i / (kColumns * kRows), y = top + row;
    Quad quad = {};
    if (channel < channels && y >= 0 && y < height) {
      quad = load_quad(planes + (static_cast<int64_t>(channel) * height + y) * width, left + column, width, vector);
    }
    *reinterpret_cast<Quad*>(&window[channel][row][column]) = quad;
  }
}

// The twelve pixels that a quad of pixels reaches with displacements of -4 to 4.
struct Reach {
  float value[4 + 2 * kHalo];
};

__device__ __forceinline__ Reach load_reach(const float* row) {
  Reach reach;
#pragma unroll
  for (int i = 0; i < 4 + 2 * kHalo; i += 4) {
    const Quad quad = *reinterpret_cast<const Quad*>(row + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) reach.value[i + j] = quad.value[j];
  }
  return reach;
}

struct ForwardWindows {
  float first[kStage][kTileHeight][kRow];
  float second[kStage][kTileHeight + 2 * kSearchRange][kWideRow];
};

// One warp for each vertical displacement; a thread holds all horizontal ones of four pixels.
__global__ void __launch_bounds__(kWarpSize* kSide, kForwardBlocks)
    cost_volume_forward_kernel(const float* __restrict__ features1, const float* __restrict__ features2,
                               float* __restrict__ costs, int channels, int height, int width, bool vector) {
  auto& windows = *reinterpret_cast<ForwardWindows*>(shared_memory);
  const int row = threadIdx.x % kTileHeight, column = 4 * (threadIdx.x / kTileHeight);
  const int top = blockIdx.y * kTileHeight, left = blockIdx.x * kTileWidth;
  const int64_t plane = static_cast<int64_t>(height) * width;
  features1 += static_cast<int64_t>(blockIdx.z) * channels * plane;
  features2 += static_cast<int64_t>(blockIdx.z) * channels * plane;

  Quad sums[kSide] = {};
  for (int start = 0; start < channels; start += kStage) {
    load_window<kWarpSize * kSide, kQuads>(windows.first, features1 + start * plane, channels - start, top, left,
                                           height, width, vector);
    load_window<kWarpSize * kSide, kWideQuads>(windows.second, features2 + start * plane, channels - start,
                                               top - kSearchRange, left - kHalo, height, width, vector);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kStage; ++k) {
      const auto quad = *reinterpret_cast<const Quad*>(&windows.first[k][row][column]);
      const Reach reach = load_reach(&windows.second[k][row + threadIdx.y][column]);
#pragma unroll
      for (int dx = 0; dx < kSide; ++dx) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[dx].value[i] += quad.value[i] * reach.value[kHalo - kSearchRange + dx + i];
        }
      }
    }
    __syncthreads();  // The next stage overwrites the windows.
  }

  if (top + row >= height) return;
  const float scale = 1.0f / max(channels, 1);
  costs += (static_cast<int64_t>(blockIdx.z) * kSide + threadIdx.y) * kSide * plane;
  costs += static_cast<int64_t>(top + row) * width;
#pragma unroll
  for (int dx = 0; dx < kSide; ++dx) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float cost = sums[dx].value[i] * scale;
      sums[dx].value[i] = cost > 0 ? cost : kLeakySlope * cost;
    }
    store_quad(costs + dx * plane, left + column, width, vector, sums[dx]);
  }
}

struct BackwardWindows {
  float source[kWarps * kPerWarp][kTileHeight + 2 * kSearchRange][kWideRow];
  // Two, so that one barrier per displacement row is enough.
  float weights[2][kSide][kTileHeight][kRow];
};

// Both gradients have the form result[p] = sum over d of weight[d][p] * source[p + d]:
//   features 1: the source is features 2 and the weight is gradient[d][p];
//   features 2: the source is features 1 and the weight is gradient[-d][p + d].
// `costs` is the activated cost volume, whose sign says which slope the gradient meets.
template <bool kSecond>
__global__ void __launch_bounds__(kWarpSize* kWarps)
    cost_volume_backward_kernel(const float* __restrict__ source, const float* __restrict__ costs,
                                const float* __restrict__ gradient, float* __restrict__ result, int channels,
                                int height, int width, bool vector) {
  constexpr int kGroup = kWarps * kPerWarp;
  auto& windows = *reinterpret_cast<BackwardWindows*>(shared_memory);
  // Neighbouring blocks share a tile, so that its gradient is read once from device memory.
  const int groups = (channels + kGroup - 1) / kGroup;
  const int start = blockIdx.x % groups * kGroup;
  const int top = blockIdx.y * kTileHeight, left = blockIdx.x / groups * kTileWidth;
  const int row = threadIdx.x % kTileHeight, column = 4 * (threadIdx.x / kTileHeight);
  const int64_t plane = static_cast<int64_t>(height) * width;
  const int64_t features_at = (static_cast<int64_t>(blockIdx.z) * channels + start) * plane;
  const int64_t costs_at = static_cast<int64_t>(blockIdx.z) * kDisplacements * plane;

  load_window<kWarpSize * kWarps, kWideQuads>(windows.source, source + features_at, channels - start,
                                              top - kSearchRange, left - kHalo, height, width, vector);

  Quad sums[kPerWarp] = {};
  for (int dy = 0; dy < kSide; ++dy) {
    auto& weights = windows.weights[dy % 2];
    for (int i = threadIdx.y * kWarpSize + threadIdx.x; i < kSide * kTileHeight * kQuads; i += kWarps * kWarpSize) {
      const int to_column = 4 * (i % kQuads), to_row = i / kQuads % kTileHeight;
      const int dx = i / (kQuads * kTileHeight);
      int x = left + to_column, y = top + to_row, displacement = dy * kSide + dx;
      if (kSecond) {
        x += dx - kSearchRange;
        y += dy - kSearchRange;
        displacement = kDisplacements - 1 - displacement;
      }
      Quad weight = {};
      if (y >= 0 && y < height) {
        const int64_t at = costs_at + displacement * plane + static_cast<int64_t>(y) * width;
        weight = load_quad(gradient + at, x, width, vector && !kSecond);
        const Quad cost = load_quad(costs + at, x, width, vector && !kSecond);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (!(cost.value[j] > 0)) weight.value[j] *= kLeakySlope;
        }
      }
      *reinterpret_cast<Quad*>(&weights[dx][to_row][to_column]) = weight;
    }
    __syncthreads();
    Quad weight[kSide];
#pragma unroll
    for (int dx = 0; dx < kSide; ++dx) {
      weight[dx] = *reinterpret_cast<const Quad*>(&weights[dx][row][column]);
    }
#pragma unroll
    for (int k = 0; k < kPerWarp; ++k) {
      const Reach reach = load_reach(&windows.source[threadIdx.y * kPerWarp + k][row + dy][column]);
#pragma unroll
      for (int dx = 0; dx < kSide; ++dx) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[k].value[i] += weight[dx].value[i] * reach.value[kHalo - kSearchRange + dx + i];
        }
      }
    }
  }

  if (top + row >= height) return;
  const float scale = 1.0f / channels;
  result += features_at + static_cast<int64_t>(top + row) * width;
#pragma unroll
  for (int k = 0; k < kPerWarp; ++k) {
    const int channel = threadIdx.y * kPerWarp + k;
    if (start + channel >= channels) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[k].value[i] *= scale;
    store_quad(result + channel * plane, left + column, width, vector, sums[k]);
  }
}

// Whether rows can be read and written by quads: all start at a multiple of a quad's size.
bool rows_are_quads(const Call& call, int64_t width) {
  bool aligned = width % 4 == 0;
  for (int i = 0; i < call.count; ++i) {
    aligned = aligned && reinterpret_cast<uintptr_t>(call.params[i]) % sizeof(Quad) == 0;
  }
  return aligned;
}

}  // namespace

// features1, features2 -> costs after LeakyReLU
PWCNET_OPERATOR(CostVolume) {
  Sizes sizes;
  if (const Status status = check(call, {kFeatures1, kFeatures2, kCosts}, &sizes)) return status;
  const int64_t n = sizes[kN], c = sizes[kC], h = sizes[kH], w = sizes[kW];
  if (n == 0 || h == 0 || w == 0) return kOk;
  const dim3 grid(blocks_for(w, kTileWidth), blocks_for(h, kTileHeight), n);
  return launch(cost_volume_forward_kernel, grid, dim3(kWarpSize, kSide), sizeof(ForwardWindows), call.stream,
                call.data<float>(0), call.data<float>(1), call.data<float>(2), c, h, w, rows_are_quads(call, w));
}

// features1, features2, costs after LeakyReLU, gradient of these -> gradient1, gradient2 of the features
PWCNET_OPERATOR(CostVolumeGradient) {
  Sizes sizes;
  if (const Status status = check(call, {kFeatures1, kFeatures2, kCosts, kGradient, kGradient1, kGradient2}, &sizes)) {
    return status;
  }
  const int64_t n = sizes[kN], c = sizes[kC], h = sizes[kH], w = sizes[kW];
  if (n == 0 || c == 0 || h == 0 || w == 0) return kOk;
  const float *features1 = call.data<float>(0), *features2 = call.data<float>(1);
  const float *costs = call.data<float>(2), *gradient = call.data<float>(3);
  const bool vector = rows_are_quads(call, w);
  const dim3 grid(blocks_for(w, kTileWidth) * blocks_for(c, kWarps * kPerWarp), blocks_for(h, kTileHeight), n);
  const dim3 block(kWarpSize, kWarps);
  const int status = launch(cost_volume_backward_kernel<false>, grid, block, sizeof(BackwardWindows), call.stream,
                            features2, costs, gradient, call.data<float>(4), c, h, w, vector);
  if (status != kOk) return status;
  return launch(cost_volume_backward_kernel<true>, grid, block, sizeof(BackwardWindows), call.stream, features1, costs,
                gradient, call.data<float>(5), c, h, w, vector);
}

}  // namespace pwcnet
