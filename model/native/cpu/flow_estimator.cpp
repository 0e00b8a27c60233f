// A dense flow estimator as one operator on the CPU, and its gradient.
//
// Each of five 3x3 convolutions with LeakyReLU reads the estimator's input and all results before it; the last one,
// which gives the flow, reads everything. One after the other, they would copy and convert all of these each time. Here
// they share one buffer (tall.h): each convolution reads its end and writes the blocks before that. The buffer is a
// result, too: the context network and the gradient read it as it is.
//
// Winograd's filtering, which replaces oneDNN with AVX-512, reads the images one by one.

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
#include "flow_convolution.h"
#include "onednn.h"
#include "tall.h"
#include "winograd.h"

namespace pwcnet {
namespace {

constexpr int kLayers = 5;  // before the one that gives the flow
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
    Geometry example(1, 256, 128, 96, 112);
    example.after = kLeaky;
    example.bfloat16 = bfloat16;
    const memory::desc layout = find_convolution(example).forward().chosen.src_desc();
    const auto is = [&](memory::format_tag tag) {
      return layout == memory::desc(layout.get_dims(), layout.get_data_type(), tag);
    };
    block = is(memory::format_tag::aBcd16b) ? kLanes : is(memory::format_tag::aBcd8b) && !bfloat16 ? 8 : 0;
  }
  return block;
}

// The operator and its gradient for buffers of one type, in blocks of kBlock channels.
template <class T, int kBlock>
class Estimator {
 public:
  using Weights = std::array<const float*, kLayers + 1>;
  using Gradients = std::array<float*, kLayers + 1>;

  // Channels of the input; whether the buffer has the flow after it.
  Estimator(const TallLayout& layout, int64_t channels, bool with_flow)
      : layout_(layout), channels_(channels), with_flow_(with_flow) {}

  void forward(const float* x, const Weights& weights, const Weights& biases, T* buffer, float* flow) const {
    // The flow may have a block of its own.
    const int64_t filled = layout_.size(total()), all = layout_.size(total() + kFlowChannels);
    if (with_flow_) std::memset(static_cast<void*>(buffer + filled), 0, (all - filled) * sizeof(T));
    layout_.pack(x, channels_, channels_, buffer + input_of(0));
    layout_.clear_gaps(buffer + input_of(0), channels_);
    for (int k = 0; k < kLayers; ++k) {
      convolve(channels_in(k), kGrowth[k], kLeaky, buffer + input_of(k), weights[k], biases[k], buffer + result_of(k));
      layout_.clear_gaps(buffer + result_of(k), kGrowth[k]);
    }
    convolve_to_flow<kBlock>(flow_geometry(), layout_.images<const T>(buffer), weights[kLayers], biases[kLayers], flow);
    if (!with_flow_) return;
    for_each_flow([&](int64_t at, int64_t place) { buffer[place] = flow[at]; });
  }

  // `upstream` is the gradient of the buffer, or null if nothing else reads that.
  void gradient(const Weights& weights, const T* buffer, const T* upstream, const float* flow_gradient,
                float* x_gradient, const Gradients& weight_gradients, const Gradients& bias_gradients) const {
    if (with_flow_ && upstream) {
      float* sum = scratch.floats(layout_.n * kFlowChannels * layout_.plane());
      for_each_flow([&](int64_t at, int64_t place) { sum[at] = flow_gradient[at] + to_float(upstream[place]); });
      flow_gradient = sum;
    }
    const Geometry flow = flow_geometry();
    differentiate_flow_weights<kBlock>(flow, layout_.images(buffer), flow_gradient, weight_gradients[kLayers],
                                       bias_gradients[kLayers]);
    T* before = take(kGrown);  // gradients before the activations
    float* gradient = scratch.floats(layout_.size(std::max(kGrowth[0], channels_)));
    // From the last layer to the input of the estimator, -1: what comes from outside and from the flow, and what comes
    // through later layers.
    for (int k = kLayers - 1; k >= -1; --k) {
      const T* outside = upstream ? upstream + result_of(k) : nullptr;
      differentiate_flow_input<kBlock>(flow, weights[kLayers], flow_gradient, channels_of(k + 1, kLayers),
                                       k < 0 ? channels_ : kGrowth[k], layout_.images(outside),
                                       layout_.images(gradient));
      if (k + 1 < kLayers) propagate(k, weights, before, gradient);
      if (k < 0) break;
      activate(k, buffer + result_of(k), gradient, before + result_of(k));
      differentiate_weights(k, buffer, before, weight_gradients[k], bias_gradients[k]);
    }
    layout_.unpack(gradient, channels_, x_gradient);
  }

 private:
  const TallLayout layout_;
  const int64_t channels_;
  const bool with_flow_;

  // The buffer holds the result of the last layer first, and the input of the estimator last.
  int64_t total() const { return kGrown + channels_; }
  int64_t result_of(int k) const { return layout_.size(channels_of(k + 1, kLayers)); }
  int64_t input_of(int k) const { return layout_.size(channels_of(k, kLayers)); }
  int64_t channels_in(int k) const { return channels_of(0, k) + channels_; }
  T* take(int64_t channels) const { return static_cast<T*>(scratch.take(layout_.size(channels) * sizeof(T))); }

  // Calls `function` with the places of each number of the flow, in the flow and in the buffer.
  template <class Function>
  void for_each_flow(Function function) const {
    for (int64_t i = 0; i < layout_.n; ++i)
      for (int64_t o = 0; o < kFlowChannels; ++o) {
        const int64_t channel = total() + o, first = (i * kFlowChannels + o) * layout_.plane();
        const int64_t place =
            layout_.size(channel / kBlock * kBlock) + i * (layout_.plane() + layout_.w) * kBlock + channel % kBlock;
        for (int64_t p = 0; p < layout_.plane(); ++p) function(first + p, place + p * kBlock);
      }
  }

  static constexpr bool kBfloat16 = sizeof(T) == sizeof(Bfloat16);

  Geometry flow_geometry() const { return single(total(), kFlowChannels, kNothing); }
  // What Winograd's filtering computes a layer from: each image alone.
  Geometry single(int64_t in, int64_t out, After after) const {
    Geometry g(layout_.n, in, out, layout_.h, layout_.w);
    g.after = after;
    g.block = kBlock;
    g.bfloat16 = kBfloat16;
    return g;
  }
  // What oneDNN computes it from: the tall image.
  Convolution& tall(int64_t in, int64_t out, After after) const {
    Geometry g(1, in, out, layout_.rows(), layout_.w);
    g.after = after;
    g.block = kBlock;
    g.bfloat16 = kBfloat16;
    g.bfloat16_y = kBfloat16 && after != kAdd;
    return find_convolution(g);
  }

  // One of the estimator's convolutions, or of its gradient's; leaves anything in the rows after the images of `y`.
  template <class Result>
  void convolve(int64_t in, int64_t out, After after, const T* x, const float* weight, const float* bias,
                Result* y) const {
    if (const Geometry g = single(in, out, after); suits_winograd(g)) {
      convolve_by_winograd(g, layout_.images(x), weight, bias, layout_.images(y));
      return;
    }
    const auto mark = scratch.mark();
    const auto& [chosen, primitive] = tall(in, out, after).forward();
    std::unordered_map<int, memory> arguments = {
        {DNNL_ARG_SRC, wrap(chosen.src_desc(), x)},
        {DNNL_ARG_WEIGHTS, in_layout(wrap(plain({out, in, 3, 3}), weight), chosen.weights_desc())},
        {DNNL_ARG_DST, wrap(chosen.dst_desc(), y)}};
    if (bias) arguments.insert({DNNL_ARG_BIAS, wrap(plain({out}), bias)});
    execute(primitive, chosen.scratchpad_desc(), arguments);
    scratch.release(mark);
  }

  // Adds the gradient of the result of layer `k`, or of the estimator's input if that is -1, through all layers after
  // it. As the layers after `k` read the same pixels, this is one convolution of all their gradients, which lie side by
  // side.
  void propagate(int k, const Weights& weights, const T* before, float* gradient) const {
    const int64_t in = channels_of(k + 1, kLayers), out = k < 0 ? channels_ : kGrowth[k];
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
    const int64_t blocks = layout_.blocks(kGrowth[k]), rows = layout_.rows(), row = layout_.w * kBlock;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t y = 0; y < rows; ++y) {
        const int64_t start = (block * rows + y) * row;
        if (y % (layout_.h + 1) == layout_.h) {  // after an image
          std::memset(static_cast<void*>(before + start), 0, row * sizeof(T));
          continue;
        }
        differentiate_leaky(result + start, gradient + start, before + start, row);
      }
  }

  void differentiate_weights(int k, const T* buffer, const T* before, float* weight_gradient,
                             float* bias_gradient) const {
    const int64_t in = channels_in(k);
    if (const Geometry g = single(in, kGrowth[k], kNothing); suits_winograd(g)) {
      differentiate_weights_by_winograd(g, layout_.images(buffer + input_of(k)), layout_.images(before + result_of(k)),
                                        weight_gradient, bias_gradient);
      return;
    }
    const auto mark = scratch.mark();
    const auto& step = tall(in, kGrowth[k], kNothing).weight_gradient();
    const memory result = wrap(plain({kGrowth[k], in, 3, 3}), weight_gradient);
    write_in_layout(result, step.chosen.diff_weights_desc(), [&](const memory& computed) {
      execute(step.run, step.chosen.scratchpad_desc(),
              {{DNNL_ARG_SRC, wrap(step.chosen.src_desc(), buffer + input_of(k))},
               {DNNL_ARG_DIFF_DST, wrap(step.chosen.diff_dst_desc(), before + result_of(k))},
               {DNNL_ARG_DIFF_WEIGHTS, computed},
               {DNNL_ARG_DIFF_BIAS, wrap(plain({kGrowth[k]}), bias_gradient)}});
    });
    scratch.release(mark);
  }
};

constexpr TensorSpec kX{"x", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kFlow{"flow", "float32", 4, {kN, kFlowChannels, kH, kW}};
constexpr TensorSpec kFlowGradient{"flow_gradient", "float32", 4, {kN, kFlowChannels, kH, kW}};
constexpr TensorSpec kXGradient{"x_gradient", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kSettings{"settings", "int32", 1, {2}};  // bfloat16, whether the buffer has the flow

// The call's `axis` of tensor `i`, if that has `rank` axes; else 0, which no check passes.
int64_t size_of(const Call& call, int i, int rank, int axis) {
  return i < call.count && call.ranks[i] == rank ? call.shapes[i][axis] : 0;
}

// The specification of a buffer or of its gradient, for images of this height. The type and the block are those of the
// call's tensor `i`; bfloat16 numbers come in blocks of kLanes.
TensorSpec buffer_spec(const Call& call, const char* name, int i, int64_t height) {
  const bool bfloat16 = i < call.count && !std::strcmp(call.dtypes[i], "bfloat16");
  const int64_t block = !bfloat16 && size_of(call, i, 6, 5) == 8 ? 8 : kLanes;
  return {name, bfloat16 ? "bfloat16" : "float32", 6, {1, kBlocks, kN, height + 1, kW, block}};
}

// Adds the weights of all layers, or their gradients, of an estimator with `channels` of input.
void add_weights(const char* name, int64_t channels, std::vector<TensorSpec>* specs) {
  for (int k = 0; k < kLayers; ++k)
    specs->push_back({name, "float32", 4, {kGrowth[k], channels_of(0, k) + channels, 3, 3}});
  specs->push_back({name, "float32", 4, {kFlowChannels, kGrown + channels, 3, 3}});
}

// Adds the biases of all layers, or their gradients.
void add_biases(const char* name, std::vector<TensorSpec>* specs) {
  for (const int64_t growth : kGrowth) specs->push_back({name, "float32", 1, {growth}});
  specs->push_back({name, "float32", 1, {kFlowChannels}});
}

template <class Pointer>
std::array<Pointer, kLayers + 1> pointers(const Call& call, int first) {
  std::array<Pointer, kLayers + 1> found;
  for (int k = 0; k <= kLayers; ++k) found[k] = static_cast<Pointer>(call.params[first + k]);
  return found;
}

template <class T, int kBlock>
struct Kind {
  using Number = T;
  static constexpr int block = kBlock;
};

// Calls `function` with the kind of numbers and blocks that the call's tensor `i` has, and with its layout. That is a
// buffer of so many channels.
template <class Function>
Status dispatch(const Call& call, int i, int64_t channels, int64_t height, Function function) {
  const int64_t* shape = call.shapes[i];
  const TallLayout layout{shape[2], height, shape[4], shape[5]};
  const int64_t expected[6] = {1, layout.blocks(channels), layout.n, height + 1, layout.w, layout.block};
  if (!std::equal(expected, expected + 6, shape)) return fail_shape(call, "features", shape, 6, expected, 6);
  if (!std::strcmp(call.dtypes[i], "bfloat16")) {
    function(Kind<Bfloat16, kLanes>(), layout);
  } else if (layout.block == kLanes) {
    function(Kind<float, kLanes>(), layout);
  } else {
    function(Kind<float, 8>(), layout);
  }
  return kOk;
}

}  // namespace

// Channels in a block of the features that the operators below compute; 0 if they cannot be used on this processor.
extern "C" int estimator_block(int bfloat16) {
  std::lock_guard<std::mutex> lock(operator_mutex);
  return static_cast<int>(preferred_block(bfloat16));
}

// x, six weights, six biases, settings -> features, flow
PWCNET_OPERATOR(FlowEstimator) {
  const int64_t channels = size_of(call, 0, 4, 1), height = size_of(call, 0, 4, 2);
  std::vector<TensorSpec> specs = {kX};
  add_weights("weight", channels, &specs);
  add_biases("bias", &specs);
  specs.insert(specs.end(), {kSettings, buffer_spec(call, "features", 14, height), kFlow});
  return run(call, specs, [&](const Sizes&) {
    const bool with_flow = call.data<int32_t>(13)[1];
    return dispatch(call, 14, kGrown + channels + with_flow * kFlowChannels, height, [&](auto kind, auto layout) {
      using T = typename decltype(kind)::Number;
      Estimator<T, decltype(kind)::block>(layout, channels, with_flow)
          .forward(call.data<float>(0), pointers<const float*>(call, 1), pointers<const float*>(call, 7),
                   call.data<T>(14), call.data<float>(15));
    });
  });
}

// The estimator with features that another operator reads.
PWCNET_OPERATOR_ALIAS(FeatureEstimator, FlowEstimator)

// Six weights, features, gradient of the features if anything else reads them, gradient of the flow, settings
// -> gradients of x, weights and biases
PWCNET_OPERATOR(FlowEstimatorGradient) {
  constexpr int kFeatures = kLayers + 1;
  const int read = call.count == 23, flow = kFeatures + 1 + read, x = flow + 2;
  const int64_t channels = size_of(call, 0, 4, 1), height = size_of(call, flow, 4, 2);
  std::vector<TensorSpec> specs;
  add_weights("weight", channels, &specs);
  specs.push_back(buffer_spec(call, "features", kFeatures, height));
  if (read) specs.push_back(buffer_spec(call, "features_gradient", kFeatures, height));
  specs.insert(specs.end(), {kFlowGradient, kSettings, kXGradient});
  add_weights("weight_gradient", channels, &specs);
  add_biases("bias_gradient", &specs);
  return run(call, specs, [&](const Sizes&) {
    const bool with_flow = call.data<int32_t>(flow + 1)[1];
    return dispatch(
        call, kFeatures, kGrown + channels + with_flow * kFlowChannels, height, [&](auto kind, auto layout) {
          using T = typename decltype(kind)::Number;
          Estimator<T, decltype(kind)::block>(layout, channels, with_flow)
              .gradient(pointers<const float*>(call, 0), call.data<T>(kFeatures),
                        read ? call.data<T>(kFeatures + 1) : nullptr, call.data<float>(flow), call.data<float>(x),
                        pointers<float*>(call, x + 1), pointers<float*>(call, x + 2 + kLayers));
        });
  });
}

// features -> (N, C, H, W)
PWCNET_OPERATOR(UnpackFeatures) {
  const int64_t height = size_of(call, 1, 4, 2);
  return run(call, {buffer_spec(call, "features", 0, height), {"y", "float32", 4, {kN, kC, kH, kW}}},
             [&](const Sizes& sizes) {
               return dispatch(call, 0, sizes[kC], height, [&](auto kind, auto layout) {
                 layout.unpack(call.data<typename decltype(kind)::Number>(0), sizes[kC], call.data<float>(1));
               });
             });
}

// Gradient of (N, C, H, W), features -> gradient of the features
PWCNET_OPERATOR(UnpackFeaturesGradient) {
  const int64_t height = size_of(call, 0, 4, 2);
  const std::vector<TensorSpec> specs = {{"gradient", "float32", 4, {kN, kC, kH, kW}},
                                         buffer_spec(call, "features", 1, height),
                                         buffer_spec(call, "features_gradient", 2, height)};
  return run(call, specs, [&](const Sizes& sizes) {
    return dispatch(call, 2, sizes[kC], height, [&](auto kind, auto layout) {
      layout.pack(call.data<float>(0), sizes[kC], sizes[kC], call.data<typename decltype(kind)::Number>(2));
    });
  });
}

}  // namespace pwcnet
