// The densely connected convolutions of a flow estimator as one operator on the CPU, and their gradient.
//
// Each of five 3x3 convolutions with LeakyReLU reads the block's input and all results before it. One after the other,
// they would copy and convert all of these each time. Here they share one buffer in oneDNN's blocked layout: each
// convolution reads its end and writes the blocks before that.
//
// The images of a batch lie below each other in the buffer, with a row of zeros between them, as one tall image: what
// oneDNN's convolution reads is then contiguous. The row takes the place of the padding. Winograd's filtering, which
// replaces oneDNN with AVX-512, reads the images one by one.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "../abi.h"
#include "bfloat16.h"
#include "convolution.h"
#include "onednn.h"
#include "winograd.h"

namespace pwcnet {
namespace {

constexpr int kLayers = 5;
// Channels of the layers' results; multiples of a block.
constexpr std::array<int64_t, kLayers> kGrowth = {128, 128, 96, 64, 32};

// Channels of the results of the layers `first` to `last` - 1.
constexpr int64_t channels_of(int first, int last) {
  int64_t sum = 0;
  for (int layer = first; layer < last; ++layer) sum += kGrowth[layer];
  return sum;
}

constexpr int64_t kGrown = channels_of(0, kLayers);

// The block of channels that oneDNN's convolutions prefer for their images; 0 if they prefer another layout.
int64_t preferred_block(bool bfloat16) {
  static int64_t found[2] = {-1, -1};
  int64_t& block = found[bfloat16];
  if (block < 0) {
    const Geometry example{1, 256, 128, 96, 112, 1, 1, kLeaky, bfloat16, 0};
    const memory::desc layout = find_convolution(example).forward().chosen.src_desc();
    const auto is = [&](memory::format_tag tag) {
      return layout == memory::desc(layout.get_dims(), layout.get_data_type(), tag);
    };
    block = is(memory::format_tag::aBcd16b) ? 16 : is(memory::format_tag::aBcd8b) ? 8 : 0;
  }
  return block;
}

struct Shape {
  int64_t n, c, h, w;
  bool bfloat16;
  int64_t block;

  int64_t rows() const { return n * (h + 1) - 1; }  // of the tall image
  int64_t total() const { return kGrown + c; }
  int64_t plane() const { return h * w; }
  memory::data_type type() const { return bfloat16 ? memory::data_type::bf16 : memory::data_type::f32; }
  // Elements of a buffer with so many channels.
  int64_t elements(int64_t channels) const { return round_up(channels, block) * rows() * w; }

  memory::desc tall(int64_t channels, memory::data_type type) const {
    return {{1, channels, rows(), w}, type, block == 16 ? memory::format_tag::aBcd16b : memory::format_tag::aBcd8b};
  }
  Geometry convolution(int64_t in, int64_t out, After after) const {
    return {1, in, out, rows(), w, 1, 1, after, bfloat16, block, 0, bfloat16 && after != kAdd};
  }
};

// Sets the rows between the images to zero in a buffer of so many channels.
template <class T>
void clear_gaps(const Shape& s, T* buffer, int64_t channels) {
  const int64_t blocks = round_up(channels, s.block) / s.block, row = s.w * s.block;
#pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < blocks; ++k)
    for (int64_t i = 1; i < s.n; ++i)
      std::memset(buffer + (k * s.rows() + i * (s.h + 1) - 1) * row, 0, row * sizeof(T));
}

// Copies `channels` of NCHW images of `total` channels into a buffer, whose gaps it leaves alone.
template <class T>
void pack(const Shape& s, const float* images, int64_t total, int64_t channels, memory::data_type type, T* buffer) {
  const int64_t whole = channels / s.block * s.block, rest = channels - whole, row = s.w * s.block;
  if (whole) {
    const memory to = wrap(s.tall(whole, type), buffer);
    for (int64_t i = 0; i < s.n; ++i) {
      const memory from = wrap(part({1, whole, s.h, s.w}, total), images + i * total * s.plane());
      convert(from, wrap(to.get_desc().submemory_desc({1, whole, s.h, s.w}, {0, 0, i * (s.h + 1), 0}), buffer));
    }
  }
  if (!rest) return;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < s.n; ++i)
    for (int64_t y = 0; y < s.h; ++y) {
      T* to = buffer + (whole * s.rows() * s.w) + (i * (s.h + 1) + y) * row;
      const float* from = images + (i * total + whole) * s.plane() + y * s.w;
      for (int64_t x = 0; x < s.w; ++x)
        for (int64_t k = 0; k < s.block; ++k) to[x * s.block + k] = k < rest ? from[k * s.plane() + x] : 0.f;
    }
}

// Copies a float32 or bfloat16 buffer of `channels` to the first channels of NCHW images of `total` channels.
template <class T>
void unpack(const Shape& s, const T* buffer, memory::data_type type, int64_t channels, float* images, int64_t total) {
  const int64_t whole = channels / s.block * s.block, rest = channels - whole, row = s.w * s.block;
  if (whole) {
    const memory::desc tall = s.tall(whole, type);
    for (int64_t i = 0; i < s.n; ++i)
      convert(wrap(tall.submemory_desc({1, whole, s.h, s.w}, {0, 0, i * (s.h + 1), 0}), buffer),
              wrap(part({1, whole, s.h, s.w}, total), images + i * total * s.plane()));
  }
  for (int64_t i = 0; rest && i < s.n; ++i)
    for (int64_t y = 0; y < s.h; ++y) {
      const T* from = buffer + whole * s.rows() * s.w + (i * (s.h + 1) + y) * row;
      float* to = images + (i * total + whole) * s.plane() + y * s.w;
      for (int64_t k = 0; k < rest; ++k)
        for (int64_t x = 0; x < s.w; ++x) to[k * s.plane() + x] = to_float(from[x * s.block + k]);
    }
}

// The operator and its gradient for buffers with elements of one type.
template <class T>
class DenseBlock {
 public:
  using Weights = std::array<const float*, kLayers>;
  using Gradients = std::array<float*, kLayers>;

  explicit DenseBlock(const Shape& shape) : s(shape) {}

  void forward(const float* x, const Weights& weights, const Weights& biases, float* y) {
    T* buffer = take(s.total());
    fill(x, s.c, buffer + input_of(0), s.c);
    for (int k = 0; k < kLayers; ++k) {
      convolve(channels_in(k), kGrowth[k], kLeaky, buffer + input_of(k), weights[k], biases[k], buffer + result_of(k));
      clear_gaps(s, buffer + result_of(k), kGrowth[k]);
    }
    unpack(s, buffer, s.type(), kGrown, y, s.total());
    copy_planes(x, s.c * s.plane(), y + kGrown * s.plane(), s.total() * s.plane(), s.n, s.c * s.plane());
  }

  void gradient(const Weights& weights, const float* y, const float* upstream, float* x_gradient,
                const Gradients& weight_gradients, const Gradients& bias_gradients) {
    T* buffer = take(s.total());
    fill(y, s.total(), buffer, s.total());
    T* before = take(kGrown);  // gradients before the activations
    float* gradient = scratch.floats(s.elements(std::max(kGrowth[0], s.c)));
    // From the last layer to the input of the block, -1: what comes from outside, and what comes through later layers.
    for (int k = kLayers - 1; k >= -1; --k) {
      const int64_t channels = k < 0 ? s.c : kGrowth[k];
      pack(s, upstream + channels_of(k + 1, kLayers) * s.plane(), s.total(), channels, memory::data_type::f32,
           gradient);
      if (k + 1 < kLayers) propagate(k, weights, before, gradient);
      if (k < 0) break;
      activate(k, buffer + result_of(k), gradient, before + result_of(k));
      differentiate_weights(k, buffer, before, weight_gradients[k], bias_gradients[k]);
    }
    unpack(s, gradient, memory::data_type::f32, s.c, x_gradient, s.c);
  }

 private:
  const Shape s;

  // The buffer holds the result of the last layer first, and the input of the block last.
  int64_t result_of(int k) const { return s.elements(channels_of(k + 1, kLayers)); }
  int64_t input_of(int k) const { return s.elements(channels_of(k, kLayers)); }
  int64_t channels_in(int k) const { return channels_of(0, k) + s.c; }
  T* take(int64_t channels) const { return static_cast<T*>(scratch.take(s.elements(channels) * sizeof(T))); }

  void fill(const float* images, int64_t total, T* buffer, int64_t channels) const {
    pack(s, images, total, channels, s.type(), buffer);
    clear_gaps(s, buffer, channels);
  }

  // What Winograd's filtering computes a layer from: each image alone, not the tall one.
  Geometry single(int64_t in, int64_t out, After after) const {
    return {s.n, in, out, s.h, s.w, 1, 1, after, s.bfloat16, s.block};
  }
  template <class Number>
  BlockedImages<Number> images(Number* buffer) const {
    return {buffer, (s.h + 1) * s.w * s.block, s.rows() * s.w * s.block};
  }

  // One of the block's convolutions, or of its gradient's; leaves anything in the gaps of `y`.
  template <class Result>
  void convolve(int64_t in, int64_t out, After after, const T* x, const float* weight, const float* bias,
                Result* y) const {
    if (const Geometry g = single(in, out, after); suits_winograd(g)) {
      convolve_by_winograd(g, images(x), weight, bias, images(y));
      return;
    }
    const auto mark = scratch.mark();
    const auto& [chosen, primitive] = find_convolution(s.convolution(in, out, after)).forward();
    std::unordered_map<int, memory> arguments = {
        {DNNL_ARG_SRC, wrap(chosen.src_desc(), x)},
        {DNNL_ARG_WEIGHTS, in_layout(wrap(plain({out, in, 3, 3}), weight), chosen.weights_desc())},
        {DNNL_ARG_DST, wrap(chosen.dst_desc(), y)}};
    if (bias) arguments.insert({DNNL_ARG_BIAS, wrap(plain({out}), bias)});
    execute(primitive, chosen.scratchpad_desc(), arguments);
    scratch.release(mark);
  }

  // Adds the gradient of the result of layer `k`, or of the block's input if that is -1, through all layers after it.
  // As the layers after `k` read the same pixels, this is one convolution of all their gradients, which lie side by
  // side.
  void propagate(int k, const Weights& weights, const T* before, float* gradient) const {
    const int64_t in = channels_of(k + 1, kLayers), out = k < 0 ? s.c : kGrowth[k];
    const auto mark = scratch.mark();
    float* turned = scratch.floats(out * in * kTaps);
    int64_t place = 0;
    for (int layer = kLayers - 1; layer > k; place += kGrowth[layer--])
      turn_weights(weights[layer], kGrowth[layer], channels_in(layer), channels_of(k + 1, layer), out,
                   turned + place * kTaps, in);
    convolve(in, out, kAdd, before, turned, nullptr, gradient);
    scratch.release(mark);
  }

  // The gradient of layer `k` before its activation.
  void activate(int k, const T* result, const float* gradient, T* before) const {
    const int64_t blocks = kGrowth[k] / s.block, row = s.w * s.block;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t y = 0; y < s.rows(); ++y) {
        const int64_t start = (block * s.rows() + y) * row;
        if (y % (s.h + 1) == s.h) {  // between two images
          std::memset(static_cast<void*>(before + start), 0, row * sizeof(T));
          continue;
        }
        for (int64_t at = start; at < start + row; ++at)
          before[at] = gradient[at] * (is_positive(result[at]) ? 1.f : kLeakySlope);
      }
  }

  void differentiate_weights(int k, const T* buffer, const T* before, float* weight_gradient,
                             float* bias_gradient) const {
    const int64_t in = channels_in(k);
    if (const Geometry g = single(in, kGrowth[k], kNothing); suits_winograd(g)) {
      differentiate_weights_by_winograd(g, images(buffer + input_of(k)), images(before + result_of(k)), weight_gradient,
                                        bias_gradient);
      return;
    }
    const auto mark = scratch.mark();
    const auto& [chosen, primitive] = find_convolution(s.convolution(in, kGrowth[k], kNothing)).weight_gradient();
    const memory found = allocate(chosen.diff_weights_desc());
    execute(primitive, chosen.scratchpad_desc(),
            {{DNNL_ARG_SRC, wrap(chosen.src_desc(), buffer + input_of(k))},
             {DNNL_ARG_DIFF_DST, wrap(chosen.diff_dst_desc(), before + result_of(k))},
             {DNNL_ARG_DIFF_WEIGHTS, found},
             {DNNL_ARG_DIFF_BIAS, wrap(plain({kGrowth[k]}), bias_gradient)}});
    convert(found, wrap(plain({kGrowth[k], in, 3, 3}), weight_gradient));
    scratch.release(mark);
  }
};

constexpr TensorSpec kX{"x", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kY{"y", "float32", 4, {kN, kOutC, kH, kW}};
constexpr TensorSpec kGradient{"gradient", "float32", 4, {kN, kOutC, kH, kW}};
constexpr TensorSpec kXGradient{"x_gradient", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kSettings{"settings", "int32", 1, {1}};  // whether to compute in bfloat16

// Adds the weights of all layers of a block with `channels` of input, or their gradients.
void add_weights(const char* name, int64_t channels, std::vector<TensorSpec>* specs) {
  for (int k = 0; k < kLayers; ++k)
    specs->push_back({name, "float32", 4, {kGrowth[k], channels_of(0, k) + channels, 3, 3}});
}

// Adds the biases of all layers, or their gradients.
void add_biases(const char* name, std::vector<TensorSpec>* specs) {
  for (int k = 0; k < kLayers; ++k) specs->push_back({name, "float32", 1, {kGrowth[k]}});
}

template <class Pointer>
std::array<Pointer, kLayers> pointers(const Call& call, int first) {
  std::array<Pointer, kLayers> found;
  for (int k = 0; k < kLayers; ++k) found[k] = static_cast<Pointer>(call.params[first + k]);
  return found;
}

// Calls `function` with a DenseBlock for the elements that a call's settings ask for.
template <class Function>
Status dispatch(const Call& call, const Sizes& sizes, int settings, Function function) {
  const bool bfloat16 = call.data<int32_t>(settings)[0];
  const Shape shape{sizes[kN], sizes[kC], sizes[kH], sizes[kW], bfloat16, preferred_block(bfloat16)};
  if (sizes[kOutC] != shape.total()) {
    std::fprintf(stderr, "%s: %lld channels in and %lld out, expected %lld out\n", call.name,
                 static_cast<long long>(shape.c), static_cast<long long>(sizes[kOutC]),
                 static_cast<long long>(shape.total()));
    return kShape;
  }
  if (!shape.block) {
    std::fprintf(stderr, "%s: oneDNN's convolutions do not use blocked layouts on this processor\n", call.name);
    return kFailed;
  }
  if (bfloat16) {
    function(DenseBlock<Bfloat16>(shape));
  } else {
    function(DenseBlock<float>(shape));
  }
  return kOk;
}

}  // namespace

// Whether the operators below can be used on this processor.
extern "C" int has_dense_block(int bfloat16) {
  std::lock_guard<std::mutex> lock(operator_mutex);
  return preferred_block(bfloat16) != 0;
}

// x, five weights, five biases, settings (bfloat16) -> y
PWCNET_OPERATOR(DenseBlock) {
  std::vector<TensorSpec> specs = {kX};
  add_weights("weight", call.ranks[0] == 4 ? call.shapes[0][1] : 0, &specs);
  add_biases("bias", &specs);
  specs.insert(specs.end(), {kSettings, kY});
  return run(call, specs, [&](const Sizes& sizes) {
    return dispatch(call, sizes, 11, [&](auto block) {
      block.forward(call.data<float>(0), pointers<const float*>(call, 1), pointers<const float*>(call, 6),
                    call.data<float>(12));
    });
  });
}

// Five weights, y, gradient of y, settings -> gradients of x, weights and biases
PWCNET_OPERATOR(DenseBlockGradient) {
  const int64_t channels = call.count > 5 && call.ranks[5] == 4 ? call.shapes[5][1] - kGrown : 0;
  std::vector<TensorSpec> specs;
  add_weights("weight", channels, &specs);
  specs.insert(specs.end(), {kY, kGradient, kSettings, kXGradient});
  add_weights("weight_gradient", channels, &specs);
  add_biases("bias_gradient", &specs);
  return run(call, specs, [&](const Sizes& sizes) {
    return dispatch(call, sizes, 7, [&](auto block) {
      block.gradient(pointers<const float*>(call, 0), call.data<float>(5), call.data<float>(6), call.data<float>(8),
                     pointers<float*>(call, 9), pointers<float*>(call, 14));
    });
  });
}

}  // namespace pwcnet
