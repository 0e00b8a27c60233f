// Cost volume and warping on the GPU, behind MindSpore's ahead-of-time custom operators.
//
// What they compute is defined by cost_volume and warp in model/operators.py; all tensors are NCHW. Each
// exported function takes its inputs and then its outputs, as its comment at the end of this file
// lists them. Features may be float32 or float16; sums are float32 always, and so is the flow.
//
// No framework header is included, so the library depends on no version of MindSpore's C++ classes.

#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

// Named once for all kernels: CUDA wants one type for the block's dynamic shared memory.
extern __shared__ float4 shared_memory[];

namespace {

// What a function returns; MindSpore puts the number into its message.
enum Status { kOk = 0, kParameterCount = 1, kType = 2, kShape = 3, kRange = 4, kCuda = 1000 };

constexpr float kLeakySlope = 0.1f;

// A block works on a tile of 16 x 8 pixels, each of its warps on the whole tile: 8 rows of 4 quads.
// Wider tiles would idle at the coarse levels, where images are 7 to 28 pixels wide.
constexpr int kTileWidth = 16;
constexpr int kTileHeight = 8;
constexpr int kQuads = kTileWidth / 4;
constexpr int kWarp = 32;
// Columns kept on either side of a tile: the largest search range, and a whole quad.
constexpr int kHalo = 4;
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

// Threads along the channels in the warping kernels, whose blocks cover 32 successive pixels.
constexpr int kChannelThreads = 8;

template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T value[4];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ void assign(float &target, float value) { target = value; }
__device__ __forceinline__ void assign(__half &target, float value) {
  target = __float2half(value);
}

// Pixels x to x + 3 of a row, zero outside it. `vector` says that rows are whole quads and x is a
// multiple of four, so that one load does it.
template <class T>
__device__ __forceinline__ Quad<float> load_quad(const T *__restrict__ row, int x, int width,
                                                 bool vector) {
  Quad<float> result = {};
  if (vector) {
    if (x >= 0 && x < width) {
      const Quad<T> found = *reinterpret_cast<const Quad<T> *>(row + x);
#pragma unroll
      for (int i = 0; i < 4; ++i) result.value[i] = to_float(found.value[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (x + i >= 0 && x + i < width) result.value[i] = to_float(row[x + i]);
    }
  }
  return result;
}

template <class T>
__device__ __forceinline__ void store_quad(T *__restrict__ row, int x, int width, bool vector,
                                           const Quad<float> &values) {
  Quad<T> converted;
#pragma unroll
  for (int i = 0; i < 4; ++i) assign(converted.value[i], values.value[i]);
  if (vector) {
    if (x < width) *reinterpret_cast<Quad<T> *>(row + x) = converted;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (x + i < width) row[x + i] = converted.value[i];
    }
  }
}

// The whole block brings a window of several channels to shared memory, zeros outside the image
// and for channels that do not exist.
template <int kThreads, int kColumns, int kCount, int kRows, int kLength, class T>
__device__ __forceinline__ void load_window(float (&window)[kCount][kRows][kLength],
                                            const T *__restrict__ planes, int channels, int top,
                                            int left, int height, int width, bool vector) {
#pragma unroll 1  // Unrolled, its indices fill the registers that the sums need.
  for (int i = threadIdx.y * kWarp + threadIdx.x; i < kCount * kRows * kColumns; i += kThreads) {
    const int column = 4 * (i % kColumns), row = i / kColumns % kRows;
    const int channel = i / (kColumns * kRows), y = top + row;
    Quad<float> quad = {};
    if (channel < channels && y >= 0 && y < height) {
      quad = load_quad(planes + (static_cast<int64_t>(channel) * height + y) * width,
                       left + column, width, vector);
    }
    *reinterpret_cast<Quad<float> *>(&window[channel][row][column]) = quad;
  }
}

// The twelve pixels that a quad of pixels reaches with displacements of -4 to 4.
struct Reach {
  float value[4 + 2 * kHalo];
};

__device__ __forceinline__ Reach load_reach(const float *row) {
  Reach reach;
#pragma unroll
  for (int i = 0; i < 4 + 2 * kHalo; i += 4) {
    const Quad<float> quad = *reinterpret_cast<const Quad<float> *>(row + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) reach.value[i + j] = quad.value[j];
  }
  return reach;
}

template <int kRange>
struct ForwardWindows {
  float first[kStage][kTileHeight][kRow];
  float second[kStage][kTileHeight + 2 * kRange][kWideRow];
};

// One warp for each vertical displacement; a thread holds all horizontal ones of four pixels.
template <class T, int kRange>
__global__ void __launch_bounds__(kWarp *(2 * kRange + 1), kForwardBlocks)
    cost_volume_forward_kernel(const T *__restrict__ features1, const T *__restrict__ features2,
                               T *__restrict__ costs, int channels, int height, int width,
                               bool vector) {
  constexpr int kSide = 2 * kRange + 1;
  auto &windows = *reinterpret_cast<ForwardWindows<kRange> *>(shared_memory);
  const int row = threadIdx.x % kTileHeight, column = 4 * (threadIdx.x / kTileHeight);
  const int top = blockIdx.y * kTileHeight, left = blockIdx.x * kTileWidth;
  const int64_t plane = static_cast<int64_t>(height) * width;
  features1 += static_cast<int64_t>(blockIdx.z) * channels * plane;
  features2 += static_cast<int64_t>(blockIdx.z) * channels * plane;

  Quad<float> sums[kSide] = {};
  for (int start = 0; start < channels; start += kStage) {
    load_window<kWarp * kSide, kQuads>(windows.first, features1 + start * plane,
                                       channels - start, top, left, height, width, vector);
    load_window<kWarp * kSide, kWideQuads>(windows.second, features2 + start * plane,
                                           channels - start, top - kRange, left - kHalo, height,
                                           width, vector);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kStage; ++k) {
      const auto quad = *reinterpret_cast<const Quad<float> *>(&windows.first[k][row][column]);
      const Reach reach = load_reach(&windows.second[k][row + threadIdx.y][column]);
#pragma unroll
      for (int dx = 0; dx < kSide; ++dx) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[dx].value[i] += quad.value[i] * reach.value[kHalo - kRange + dx + i];
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

template <int kRange>
struct BackwardWindows {
  float source[kWarps * kPerWarp][kTileHeight + 2 * kRange][kWideRow];
  // Two, so that one barrier per displacement row is enough.
  float weights[2][2 * kRange + 1][kTileHeight][kRow];
};

// Both gradients have the form result[p] = sum over d of weight[d][p] * source[p + d]:
//   features 1: the source is features 2 and the weight is gradient[d][p];
//   features 2: the source is features 1 and the weight is gradient[-d][p + d].
// `costs` is the activated cost volume, whose sign says which slope the gradient meets.
template <class T, int kRange, bool kSecond>
__global__ void __launch_bounds__(kWarp *kWarps)
    cost_volume_backward_kernel(const T *__restrict__ source, const T *__restrict__ costs,
                                const T *__restrict__ gradient, T *__restrict__ result,
                                int channels, int height, int width, bool vector) {
  constexpr int kSide = 2 * kRange + 1, kGroup = kWarps * kPerWarp;
  auto &windows = *reinterpret_cast<BackwardWindows<kRange> *>(shared_memory);
  // Neighbouring blocks share a tile, so that its gradient is read once from device memory.
  const int groups = (channels + kGroup - 1) / kGroup;
  const int start = blockIdx.x % groups * kGroup;
  const int top = blockIdx.y * kTileHeight, left = blockIdx.x / groups * kTileWidth;
  const int row = threadIdx.x % kTileHeight, column = 4 * (threadIdx.x / kTileHeight);
  const int64_t plane = static_cast<int64_t>(height) * width;
  const int64_t features_at = (static_cast<int64_t>(blockIdx.z) * channels + start) * plane;
  const int64_t costs_at = static_cast<int64_t>(blockIdx.z) * kSide * kSide * plane;

  load_window<kWarp * kWarps, kWideQuads>(windows.source, source + features_at, channels - start,
                                          top - kRange, left - kHalo, height, width, vector);

  Quad<float> sums[kPerWarp] = {};
  for (int dy = 0; dy < kSide; ++dy) {
    auto &weights = windows.weights[dy % 2];
    for (int i = threadIdx.y * kWarp + threadIdx.x; i < kSide * kTileHeight * kQuads;
         i += kWarps * kWarp) {
      const int to_column = 4 * (i % kQuads), to_row = i / kQuads % kTileHeight;
      const int dx = i / (kQuads * kTileHeight);
      int x = left + to_column, y = top + to_row, displacement = dy * kSide + dx;
      if (kSecond) {
        x += dx - kRange;
        y += dy - kRange;
        displacement = kSide * kSide - 1 - displacement;
      }
      Quad<float> weight = {};
      if (y >= 0 && y < height) {
        const int64_t at = costs_at + displacement * plane + static_cast<int64_t>(y) * width;
        weight = load_quad(gradient + at, x, width, vector && !kSecond);
        const Quad<float> cost = load_quad(costs + at, x, width, vector && !kSecond);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (!(cost.value[j] > 0)) weight.value[j] *= kLeakySlope;
        }
      }
      *reinterpret_cast<Quad<float> *>(&weights[dx][to_row][to_column]) = weight;
    }
    __syncthreads();
    Quad<float> weight[kSide];
#pragma unroll
    for (int dx = 0; dx < kSide; ++dx) {
      weight[dx] = *reinterpret_cast<const Quad<float> *>(&weights[dx][row][column]);
    }
#pragma unroll
    for (int k = 0; k < kPerWarp; ++k) {
      const Reach reach =
          load_reach(&windows.source[threadIdx.y * kPerWarp + k][row + dy][column]);
#pragma unroll
      for (int dx = 0; dx < kSide; ++dx) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[k].value[i] += weight[dx].value[i] * reach.value[kHalo - kRange + dx + i];
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

// The four pixels around the place that a pixel's flow points to: where they are, their bilinear
// weights, and the weights' derivatives by the place. All are 0 for a pixel that does not exist;
// so every offset may be read.
struct Taps {
  int at[4];
  float weight[4], by_x[4], by_y[4];
};

__device__ __forceinline__ Taps find_taps(const float *__restrict__ flow, int pixel, int height,
                                          int width) {
  Taps taps = {};
  const int plane = height * width;
  const float x = pixel % width + flow[pixel];
  const float y = pixel / width + flow[static_cast<int64_t>(plane) + pixel];
  // False for flow that is not a number, too.
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

template <class T>
__global__ void __launch_bounds__(kWarp *kChannelThreads)
    warp_forward_kernel(const T *__restrict__ features, const float *__restrict__ flow,
                        T *__restrict__ result, int channels, int height, int width) {
  const int plane = height * width;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  if (place >= plane) return;
  const int pixel = static_cast<int>(place);
  const int64_t sample = static_cast<int64_t>(blockIdx.y) * plane;
  const Taps taps = find_taps(flow + 2 * sample, pixel, height, width);
#pragma unroll 4
  for (int channel = threadIdx.y; channel < channels; channel += kChannelThreads) {
    const int64_t at = sample * channels + static_cast<int64_t>(channel) * plane;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += taps.weight[i] * to_float(features[at + taps.at[i]]);
    assign(result[at + pixel], sum);
  }
}

struct FlowSums {
  float x[kChannelThreads][kWarp], y[kChannelThreads][kWarp];
};

// `to_features` must be zero before. Any number of pixels may point to one place, hence the
// atomic additions; the sums for the flow are made in a fixed order.
template <class T>
__global__ void __launch_bounds__(kWarp *kChannelThreads)
    warp_backward_kernel(const T *__restrict__ features, const float *__restrict__ flow,
                         const T *__restrict__ gradient, float *__restrict__ to_features,
                         float *__restrict__ to_flow, int channels, int height, int width) {
  auto &sums = *reinterpret_cast<FlowSums *>(shared_memory);
  const int plane = height * width;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const int64_t sample = static_cast<int64_t>(blockIdx.y) * plane;
  float sum_x = 0, sum_y = 0;
  if (place < plane) {
    const int pixel = static_cast<int>(place);
    const Taps taps = find_taps(flow + 2 * sample, pixel, height, width);
#pragma unroll 2
    for (int channel = threadIdx.y; channel < channels; channel += kChannelThreads) {
      const int64_t at = sample * channels + static_cast<int64_t>(channel) * plane;
      const float upstream = to_float(gradient[at + pixel]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float product = upstream * to_float(features[at + taps.at[i]]);
        sum_x += taps.by_x[i] * product;
        sum_y += taps.by_y[i] * product;
        if (taps.weight[i] != 0) {
          atomicAdd(to_features + at + taps.at[i], taps.weight[i] * upstream);
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
  to_flow[2 * sample + place] = sum_x;
  to_flow[2 * sample + plane + place] = sum_y;
}

// What MindSpore hands to a custom operator.
struct Call {
  int count;
  void **params;
  int *ndims;
  int64_t **shapes;
  const char **dtypes;
  void *stream;

  template <class T>
  T *param(int i) const {
    return static_cast<T *>(params[i]);
  }
  bool has_type(int i, const char *name) const { return strcmp(dtypes[i], name) == 0; }
};

// Of the features.
struct Shape {
  int samples, channels, height, width;
};

// Reads the first tensor's shape and checks that the others differ from it at most in their
// channels, which `channels` tells (0: as many as the first has), and that an int can count the
// pixels of one image.
Status read_shape(const Call &call, const int *channels, Shape *shape) {
  const int64_t limit = INT32_MAX - kTileWidth;
  if (call.ndims[0] != 4) return kShape;
  const int64_t *first = call.shapes[0];
  for (int i = 0; i < 4; ++i) {
    if (first[i] < 0 || first[i] > limit) return kShape;
  }
  if (first[2] * first[3] > limit) return kShape;
  for (int i = 1; i < call.count; ++i) {
    const int64_t *other = call.shapes[i];
    if (call.ndims[i] != 4 || other[0] != first[0] || other[2] != first[2] ||
        other[3] != first[3] || other[1] != (channels[i] ? channels[i] : first[1])) {
      return kShape;
    }
  }
  *shape = {static_cast<int>(first[0]), static_cast<int>(first[1]), static_cast<int>(first[2]),
            static_cast<int>(first[3])};
  return kOk;
}

// Keeps the arguments out of the deduction of P: they are converted to what the kernel takes.
template <class T>
struct Same {
  using type = T;
};

template <class... P>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, const Call &call,
           typename Same<P>::type... arguments) {
#ifdef __CUDACC__
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(call.stream)>>>(arguments...);
#else  // tests/cuda_on_cpu
  launch_on_cpu(kernel, grid, block, shared_bytes, arguments...);
#endif
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? static_cast<int>(kOk) : kCuda + static_cast<int>(error);
}

unsigned blocks_for(int64_t size, int per_block) {
  return static_cast<unsigned>((size + per_block - 1) / per_block);
}

// Whether rows can be read and written by quads: all start at a multiple of a quad's size.
template <class T>
bool rows_are_quads(const Call &call, int width) {
  bool aligned = width % 4 == 0;
  for (int i = 0; i < call.count; ++i) {
    aligned = aligned && reinterpret_cast<uintptr_t>(call.params[i]) % sizeof(Quad<T>) == 0;
  }
  return aligned;
}

template <class T, int kRange>
int cost_volume_forward(const Call &call, Shape shape) {
  const dim3 grid(blocks_for(shape.width, kTileWidth), blocks_for(shape.height, kTileHeight),
                  shape.samples);
  return launch(cost_volume_forward_kernel<T, kRange>, grid, dim3(kWarp, 2 * kRange + 1),
                sizeof(ForwardWindows<kRange>), call, call.param<const T>(0),
                call.param<const T>(1), call.param<T>(2), shape.channels, shape.height,
                shape.width, rows_are_quads<T>(call, shape.width));
}

template <class T, int kRange>
int cost_volume_backward(const Call &call, Shape shape) {
  if (shape.channels == 0) return kOk;
  const T *costs = call.param<const T>(2);
  const T *gradient = call.param<const T>(3);
  const bool vector = rows_are_quads<T>(call, shape.width);
  const dim3 grid(blocks_for(shape.width, kTileWidth) *
                      blocks_for(shape.channels, kWarps * kPerWarp),
                  blocks_for(shape.height, kTileHeight), shape.samples);
  const dim3 block(kWarp, kWarps);
  const size_t shared_bytes = sizeof(BackwardWindows<kRange>);
  const int status =
      launch(cost_volume_backward_kernel<T, kRange, false>, grid, block, shared_bytes, call,
             call.param<const T>(1), costs, gradient, call.param<T>(4), shape.channels,
             shape.height, shape.width, vector);
  if (status != kOk) return status;
  return launch(cost_volume_backward_kernel<T, kRange, true>, grid, block, shared_bytes, call,
                call.param<const T>(0), costs, gradient, call.param<T>(5),
                shape.channels, shape.height, shape.width, vector);
}

using CostVolumeFunction = int (*)(const Call &, Shape);

// Common part of both cost volume functions. `of_costs` says which of the `count` tensors have
// the costs' channels, the third among them; the table holds the functions for float32 and float16
// with search ranges of 1 to 4.
int cost_volume(const Call &call, int count, const bool *of_costs,
                const CostVolumeFunction (&table)[2][kHalo]) {
  if (call.count != count) return kParameterCount;
  const bool half = call.has_type(0, "float16");
  for (int i = 0; i < count; ++i) {
    if (!call.has_type(i, half ? "float16" : "float32")) return kType;
  }
  if (call.ndims[2] != 4) return kShape;
  const int64_t displacements = call.shapes[2][1];
  int range = 1;
  while (range <= kHalo && (2 * range + 1) * (2 * range + 1) != displacements) ++range;
  if (range > kHalo) return kRange;
  int channels[6] = {};
  for (int i = 0; i < count; ++i) channels[i] = of_costs[i] ? static_cast<int>(displacements) : 0;
  Shape shape;
  if (const Status status = read_shape(call, channels, &shape)) return status;
  if (shape.samples == 0 || shape.height == 0 || shape.width == 0) return kOk;
  return table[half][range - 1](call, shape);
}

int cost_volume_forward(const Call &call) {
  static const CostVolumeFunction table[2][kHalo] = {
      {cost_volume_forward<float, 1>, cost_volume_forward<float, 2>,
       cost_volume_forward<float, 3>, cost_volume_forward<float, 4>},
      {cost_volume_forward<__half, 1>, cost_volume_forward<__half, 2>,
       cost_volume_forward<__half, 3>, cost_volume_forward<__half, 4>}};
  const bool of_costs[] = {false, false, true};
  return cost_volume(call, 3, of_costs, table);
}

int cost_volume_backward(const Call &call) {
  static const CostVolumeFunction table[2][kHalo] = {
      {cost_volume_backward<float, 1>, cost_volume_backward<float, 2>,
       cost_volume_backward<float, 3>, cost_volume_backward<float, 4>},
      {cost_volume_backward<__half, 1>, cost_volume_backward<__half, 2>,
       cost_volume_backward<__half, 3>, cost_volume_backward<__half, 4>}};
  const bool of_costs[] = {false, false, true, true, false, false};
  return cost_volume(call, 6, of_costs, table);
}

dim3 warp_grid(Shape shape) {
  return dim3(blocks_for(static_cast<int64_t>(shape.height) * shape.width, kWarp), shape.samples);
}

template <class T>
int warp_forward(const Call &call, Shape shape) {
  return launch(warp_forward_kernel<T>, warp_grid(shape), dim3(kWarp, kChannelThreads), 0, call,
                call.param<const T>(0), call.param<const float>(1), call.param<T>(2),
                shape.channels, shape.height, shape.width);
}

template <class T>
int warp_backward(const Call &call, Shape shape) {
  const size_t elements = static_cast<size_t>(shape.samples) * shape.channels * shape.height *
                          static_cast<size_t>(shape.width);
  const cudaError_t error = cudaMemsetAsync(call.params[3], 0, elements * sizeof(float),
                                            static_cast<cudaStream_t>(call.stream));
  if (error != cudaSuccess) return kCuda + static_cast<int>(error);
  return launch(warp_backward_kernel<T>, warp_grid(shape), dim3(kWarp, kChannelThreads),
                sizeof(FlowSums), call, call.param<const T>(0), call.param<const float>(1),
                call.param<const T>(2), call.param<float>(3), call.param<float>(4),
                shape.channels, shape.height, shape.width);
}

using WarpFunction = int (*)(const Call &, Shape);

// Common part of both warping functions. `types` has one letter a tensor: t for the features' type,
// f for float32; `channels` is read_shape's.
int warp(const Call &call, const char *types, const int *channels, WarpFunction of_float,
         WarpFunction of_half) {
  if (call.count != static_cast<int>(strlen(types))) return kParameterCount;
  const bool half = call.has_type(0, "float16");
  for (int i = 0; i < call.count; ++i) {
    if (!call.has_type(i, half && types[i] == 't' ? "float16" : "float32")) return kType;
  }
  Shape shape;
  if (const Status status = read_shape(call, channels, &shape)) return status;
  if (shape.samples == 0 || shape.height == 0 || shape.width == 0) return kOk;
  return (half ? of_half : of_float)(call, shape);
}

}  // namespace

#define CUSTOM_OPERATOR(name)                                                         \
  extern "C" int name(int count, void **params, int *ndims, int64_t **shapes,         \
                      const char **dtypes, void *stream, void *)
#define THE_CALL (Call{count, params, ndims, shapes, dtypes, stream})

// (features1, features2) -> costs, after LeakyReLU with slope 0.1; the search range r follows from
// their (2 r + 1)^2 channels.
CUSTOM_OPERATOR(CostVolume) { return cost_volume_forward(THE_CALL); }

// (features1, features2, activated costs, gradient) -> gradients of features1 and features2.
CUSTOM_OPERATOR(CostVolumeGradient) { return cost_volume_backward(THE_CALL); }

// (features, flow in float32) -> warped features.
CUSTOM_OPERATOR(Warp) {
  const int channels[] = {0, 2, 0};
  return warp(THE_CALL, "tft", channels, warp_forward<float>, warp_forward<__half>);
}

// (features, flow in float32, gradient) -> gradients of the features and of the flow, both in
// float32: additions of many small parts would be lost in float16, so the caller converts the sum.
CUSTOM_OPERATOR(WarpGradient) {
  const int channels[] = {0, 2, 0, 0, 2};
  return warp(THE_CALL, "tftff", channels, warp_backward<float>, warp_backward<__half>);
}
