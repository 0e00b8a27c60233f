// The 3x3 convolution with bias and LeakyReLU on the CPU, and its gradient: by oneDNN in the layouts that it is fastest
// in, or by Winograd's filtering.
//
// Defined by `Convolution` in model/layers.py.

#include "convolution.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "../abi.h"
#include "bfloat16.h"
#include "flow_convolution.h"
#include "onednn.h"
#include "winograd.h"

namespace pwcnet {
namespace {

// Images, (N, C, H, W), are float32 tensors with four axes, or tensors with five in blocked layout: (N, C / kLanes
// rounded up, H, W, kLanes), in the type that the convolution multiplies. The channels that fill up the last block are
// zero.
bool is_blocked(const Call& call, int i) { return i < call.count && call.ranks[i] == 5; }
bool is_bfloat16(const Call& call, int i) { return is_blocked(call, i) && !std::strcmp(call.dtypes[i], "bfloat16"); }

// The specification of `name`, which has the axes and the type of the call's tensor `i`.
TensorSpec input_spec(const Call& call, int i, const char* name) {
  if (is_bfloat16(call, i)) return {name, "bfloat16", 5, {kN, kBlocks, kH, kW, kLanes}};
  if (is_blocked(call, i)) return {name, "float32", 5, {kN, kBlocks, kH, kW, kLanes}};
  return {name, "float32", 4, {kN, kC, kH, kW}};
}

TensorSpec result_spec(const Call& call, int i, const char* name) {
  if (is_bfloat16(call, i)) return {name, "bfloat16", 5, {kN, kOutBlocks, kOutH, kOutW, kLanes}};
  if (is_blocked(call, i)) return {name, "float32", 5, {kN, kOutBlocks, kOutH, kOutW, kLanes}};
  return {name, "float32", 4, {kN, kOut, kOutH, kOutW}};
}

memory images(const Call& call, int i, const memory::dims& dims) {
  const auto tag = is_blocked(call, i) ? memory::format_tag::aBcd16b : memory::format_tag::abcd;
  return wrap({dims, is_bfloat16(call, i) ? memory::data_type::bf16 : memory::data_type::f32, tag}, call.params[i]);
}

Status check_images(const Call& call, int i, const char* name, const memory::dims& dims) {
  const bool blocked = is_blocked(call, i);
  const int64_t blocks = round_up(dims[1], kLanes) / kLanes;
  const int64_t expected[5] = {dims[0], blocked ? blocks : dims[1], dims[2], dims[3], kLanes};
  const int rank = call.ranks[i];
  if (std::equal(expected, expected + rank, call.shapes[i])) return kOk;
  return fail_shape(call, name, call.shapes[i], rank, expected, rank);
}

// Whether flow_convolution.h computes this, from tensor `x` to tensor `y`.
bool is_flow(const Geometry& g, const Call& call, int x, int y) {
  return g.out == kFlowChannels && g.stride == 1 && g.dilation == 1 && g.after == kNothing && !is_blocked(call, x) &&
         !is_blocked(call, y);
}

// Reads a call's settings, and checks that the shapes of its input `x` and output `y` follow from them.
Status read_geometry(const Call& call, const Sizes& sizes, const int32_t* settings, int x, int y, Geometry* geometry) {
  const Geometry g{sizes[kN],   sizes[kC],
                   sizes[kOut], sizes[kH],
                   sizes[kW],   settings[0],
                   settings[1], settings[2] ? kLeaky : kNothing,
                   settings[3], 0,
                   is_bfloat16(call, x), is_bfloat16(call, y)};
  if (g.stride < 1 || g.dilation < 1) {
    std::fprintf(stderr, "%s: stride is %d and dilation %d, expected 1 or more\n", call.name, settings[0], settings[1]);
    return kShape;
  }
  if (!g.bfloat16 && (g.bfloat16_x || g.bfloat16_y)) {
    std::fprintf(stderr, "%s: x or y is bfloat16, expected float32, as the settings say\n", call.name);
    return kDtype;
  }
  *geometry = g;
  if (const Status status = check_images(call, x, "x", g.x())) return status;
  return check_images(call, y, "y", g.y());
}

// The layout of images that Winograd's filtering reads and writes.
memory::desc blocked(const Geometry& g, int64_t channels, memory::data_type type) {
  return {{g.n, channels, g.h, g.w}, type, memory::format_tag::aBcd16b};
}

template <class Number>
BlockedImages<Number> as_images(const Geometry& g, int64_t channels, const memory& found) {
  const int64_t plane = g.h * g.w;
  return {static_cast<Number*>(found.get_data_handle()), round_up(channels, kLanes) * plane, kLanes * plane};
}

// Convolves images of any layout by Winograd's filtering, and converts the result.
void convolve_by_winograd(const Geometry& g, const memory& x, const float* weight, const float* bias,
                          const memory& result) {
  const memory source = in_layout(x, blocked(g, g.in, g.type()));
  write_in_layout(result, blocked(g, g.out, g.y_type()), [&](const memory& computed) {
    if (g.bfloat16_y) {
      convolve_by_winograd(g, as_images<const Bfloat16>(g, g.in, source), weight, bias,
                           as_images<Bfloat16>(g, g.out, computed));
    } else if (g.bfloat16) {
      convolve_by_winograd(g, as_images<const Bfloat16>(g, g.in, source), weight, bias,
                           as_images<float>(g, g.out, computed));
    } else {
      convolve_by_winograd(g, as_images<const float>(g, g.in, source), weight, bias,
                           as_images<float>(g, g.out, computed));
    }
  });
}

void convolve(const Geometry& g, const memory& x, const float* weight, const float* bias, const memory& result) {
  if (suits_winograd(g)) {
    convolve_by_winograd(g, x, weight, bias, result);
    return;
  }
  const auto& step = find_convolution(g).forward();
  const memory source = in_layout(x, step.chosen.src_desc());
  const memory weights = in_layout(wrap(plain({g.out, g.in, 3, 3}), weight), step.chosen.weights_desc());
  write_in_layout(result, step.chosen.dst_desc(), [&](const memory& computed) {
    execute(step.run, step.chosen.scratchpad_desc(),
            {{DNNL_ARG_SRC, source},
             {DNNL_ARG_WEIGHTS, weights},
             {DNNL_ARG_BIAS, wrap(plain({g.out}), bias)},
             {DNNL_ARG_DST, computed}});
  });
}

// The gradient before LeakyReLU, from its result and the gradient of that.
template <class Number>
memory gradient_before_activation(const memory& y, const memory& upstream) {
  const memory before = allocate(upstream.get_desc());
  const int64_t count = upstream.get_desc().get_size() / sizeof(Number);
  const auto *result = static_cast<const Number*>(y.get_data_handle()),
             *gradient = static_cast<const Number*>(upstream.get_data_handle());
  auto* product = static_cast<Number*>(before.get_data_handle());
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; ++i)
    product[i] = to_float(gradient[i]) * (is_positive(result[i]) ? 1.f : kLeakySlope);
  return before;
}

void convolve_gradient(const Geometry& g, const memory& x, const float* weight, const memory& y, memory upstream,
                       const memory& x_gradient, float* weight_gradient, float* bias_gradient) {
  Convolution& convolution = find_convolution(g);
  const memory::dims weights{g.out, g.in, 3, 3};
  if (g.after == kLeaky) {
    upstream = g.bfloat16_y ? gradient_before_activation<Bfloat16>(y, upstream)
                            : gradient_before_activation<float>(y, upstream);
  }
  if (suits_winograd(g)) {
    const memory source = in_layout(x, blocked(g, g.in, g.type()));
    upstream = in_layout(upstream, blocked(g, g.out, g.type()));
    if (g.bfloat16) {
      differentiate_weights_by_winograd(g, as_images<const Bfloat16>(g, g.in, source),
                                        as_images<const Bfloat16>(g, g.out, upstream), weight_gradient, bias_gradient);
    } else {
      differentiate_weights_by_winograd(g, as_images<const float>(g, g.in, source),
                                        as_images<const float>(g, g.out, upstream), weight_gradient, bias_gradient);
    }
  } else {
    const auto& step = convolution.weight_gradient();
    const memory source = in_layout(x, step.chosen.src_desc());
    upstream = in_layout(upstream, step.chosen.diff_dst_desc());
    const memory result = wrap(plain(weights), weight_gradient);
    write_in_layout(result, step.chosen.diff_weights_desc(), [&](const memory& computed) {
      execute(step.run, step.chosen.scratchpad_desc(),
              {{DNNL_ARG_SRC, source},
               {DNNL_ARG_DIFF_DST, upstream},
               {DNNL_ARG_DIFF_WEIGHTS, computed},
               {DNNL_ARG_DIFF_BIAS, wrap(plain({g.out}), bias_gradient)}});
    });
  }
  const Geometry backward{g.n, g.out, g.in, g.h, g.w, g.stride, g.dilation, kNothing, g.bfloat16, 0, 0, g.bfloat16_x};
  if (suits_winograd(backward)) {
    float* turned = scratch.floats(g.in * g.out * kTaps);
    turn_weights(weight, g.out, g.in, 0, g.in, turned, g.out);
    convolve_by_winograd(backward, upstream, turned, nullptr, x_gradient);
    return;
  }
  const auto& step = convolution.input_gradient();
  const memory weights_there = in_layout(wrap(plain(weights), weight), step.chosen.weights_desc());
  const memory source = in_layout(upstream, step.chosen.diff_dst_desc());
  write_in_layout(x_gradient, step.chosen.diff_src_desc(), [&](const memory& computed) {
    execute(step.run, step.chosen.scratchpad_desc(),
            {{DNNL_ARG_DIFF_DST, source}, {DNNL_ARG_WEIGHTS, weights_there}, {DNNL_ARG_DIFF_SRC, computed}});
  });
}

constexpr TensorSpec kWeight{"weight", "float32", 4, {kOut, kC, 3, 3}};
constexpr TensorSpec kBias{"bias", "float32", 1, {kOut}};
constexpr TensorSpec kSettings{"settings", "int32", 1, {4}};
constexpr TensorSpec kWeightGradient{"weight_gradient", "float32", 4, {kOut, kC, 3, 3}};
constexpr TensorSpec kBiasGradient{"bias_gradient", "float32", 1, {kOut}};

}  // namespace

// Whether the processor multiplies bfloat16 numbers; oneDNN would imitate that otherwise.
extern "C" int has_bfloat16() { return has_isa(dnnl::cpu_isa::avx512_core_bf16); }

// Floating-point operations in a second of a convolution that is large, has many channels, and fits into the caches.
extern "C" double measure_peak(int bfloat16) {
  std::lock_guard<std::mutex> lock(operator_mutex);
  scratch.restart();
  const Geometry g{4, 256, 256, 48, 56, 1, 1, kNothing, bfloat16, 0};
  const auto& [chosen, primitive] = find_convolution(g).forward();
  const auto zeros = [](const memory::desc& desc) {
    const memory found = allocate(desc);
    std::memset(found.get_data_handle(), 0, desc.get_size());
    return found;
  };
  const std::unordered_map<int, memory> arguments = {{DNNL_ARG_SRC, zeros(chosen.src_desc())},
                                                     {DNNL_ARG_WEIGHTS, zeros(chosen.weights_desc())},
                                                     {DNNL_ARG_BIAS, zeros(plain({g.out}))},
                                                     {DNNL_ARG_DST, zeros(chosen.dst_desc())}};
  double fastest = 1e9;
  for (int repeat = 0; repeat < 8; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    execute(primitive, chosen.scratchpad_desc(), arguments);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    fastest = std::min(fastest, taken.count());
  }
  return 2.0 * g.n * g.h * g.w * g.in * g.out * 9 / fastest;
}

// x, weight, bias, settings (stride, dilation, LeakyReLU, bfloat16) -> y
PWCNET_OPERATOR(Convolution3x3) {
  return run(call, {input_spec(call, 0, "x"), kWeight, kBias, kSettings, result_spec(call, 4, "y")},
             [&](const Sizes& sizes) {
               const float *weight = call.data<float>(1), *bias = call.data<float>(2);
               Geometry g;
               if (const Status status = read_geometry(call, sizes, call.data<int32_t>(3), 0, 4, &g)) return status;
               if (is_flow(g, call, 0, 4)) {
                 convolve_to_flow(call.data<float>(0), weight, bias, call.data<float>(4), sizes);
               } else {
                 convolve(g, images(call, 0, g.x()), weight, bias, images(call, 4, g.y()));
               }
               return kOk;
             });
}

// x, weight, y, gradient of y, settings -> gradients of x, weight and bias
PWCNET_OPERATOR(Convolution3x3Gradient) {
  const std::vector<TensorSpec> specs = {input_spec(call, 0, "x"),
                                         kWeight,
                                         result_spec(call, 2, "y"),
                                         result_spec(call, 2, "gradient"),
                                         kSettings,
                                         input_spec(call, 0, "x_gradient"),
                                         kWeightGradient,
                                         kBiasGradient};
  return run(call, specs, [&](const Sizes& sizes) {
    const float* weight = call.data<float>(1);
    float *weight_gradient = call.data<float>(6), *bias_gradient = call.data<float>(7);
    Geometry g;
    if (const Status status = read_geometry(call, sizes, call.data<int32_t>(4), 0, 2, &g)) return status;
    if (is_flow(g, call, 0, 2)) {
      convolve_to_flow_gradient(call.data<float>(0), weight, call.data<float>(3), call.data<float>(5), weight_gradient,
                                bias_gradient, sizes);
    } else {
      convolve_gradient(g, images(call, 0, g.x()), weight, images(call, 2, g.y()), images(call, 3, g.y()),
                        images(call, 5, g.x()), weight_gradient, bias_gradient);
    }
    return kOk;
  });
}

}  // namespace pwcnet
