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

bool is_flow(const Geometry& g) {
  return g.out == kFlowChannels && g.stride == 1 && g.dilation == 1 && g.after == kNothing;
}

// Reads a call's settings and checks that its output `y` has the shape that follows from them.
Status read_geometry(const Call& call, const Sizes& sizes, const int32_t* settings, int y, Geometry* geometry) {
  const Geometry g{sizes[kN],   sizes[kC],
                   sizes[kOut], sizes[kH],
                   sizes[kW],   settings[0],
                   settings[1], settings[2] ? kLeaky : kNothing,
                   settings[3], 0};
  if (g.stride < 1 || g.dilation < 1) {
    std::fprintf(stderr, "%s: stride is %d and dilation %d, expected 1 or more\n", call.name, settings[0], settings[1]);
    return kShape;
  }
  const int64_t expected[4] = {g.n, g.out, g.out_h(), g.out_w()};
  if (!std::equal(expected, expected + 4, call.shapes[y])) return fail_shape(call, "y", call.shapes[y], 4, expected, 4);
  *geometry = g;
  return kOk;
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
  const memory source = in_layout(x, blocked(g, g.in, g.type())),
               computed = allocate(blocked(g, g.out, memory::data_type::f32));
  const auto y = as_images<float>(g, g.out, computed);
  if (g.bfloat16) {
    convolve_by_winograd(g, as_images<const Bfloat16>(g, g.in, source), weight, bias, y);
  } else {
    convolve_by_winograd(g, as_images<const float>(g, g.in, source), weight, bias, y);
  }
  convert(computed, result);
}

void convolve(const Geometry& g, const float* x, const float* weight, const float* bias, float* out) {
  if (suits_winograd(g)) {
    convolve_by_winograd(g, wrap(plain({g.n, g.in, g.h, g.w}), x), weight, bias,
                         wrap(plain({g.n, g.out, g.h, g.w}), out));
    return;
  }
  const auto& [chosen, primitive] = find_convolution(g).forward();
  const memory source = in_layout(wrap(plain({g.n, g.in, g.h, g.w}), x), chosen.src_desc());
  const memory weights = in_layout(wrap(plain({g.out, g.in, 3, 3}), weight), chosen.weights_desc());
  const memory result = wrap(plain({g.n, g.out, g.out_h(), g.out_w()}), out);
  const bool directly = result.get_desc() == chosen.dst_desc();
  const memory computed = directly ? result : allocate(chosen.dst_desc());
  execute(primitive, chosen.scratchpad_desc(),
          {{DNNL_ARG_SRC, source},
           {DNNL_ARG_WEIGHTS, weights},
           {DNNL_ARG_BIAS, wrap(plain({g.out}), bias)},
           {DNNL_ARG_DST, computed}});
  if (!directly) convert(computed, result);
}

void convolve_gradient(const Geometry& g, const float* x, const float* weight, const float* out, const float* gradient,
                       float* x_gradient, float* weight_gradient, float* bias_gradient) {
  Convolution& convolution = find_convolution(g);
  const memory::dims image{g.n, g.in, g.h, g.w}, weights{g.out, g.in, 3, 3};
  const memory::dims y{g.n, g.out, g.out_h(), g.out_w()};
  memory upstream = wrap(plain(y), gradient);
  if (g.after == kLeaky) {
    const int64_t count = g.n * g.out * g.out_h() * g.out_w();
    float* before = scratch.floats(count);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; ++i) before[i] = gradient[i] * (out[i] > 0 ? 1.f : kLeakySlope);
    upstream = wrap(plain(y), before);
  }
  if (suits_winograd(g)) {
    const memory source = in_layout(wrap(plain(image), x), blocked(g, g.in, g.type()));
    upstream = in_layout(upstream, blocked(g, g.out, g.type()));
    if (g.bfloat16) {
      differentiate_weights_by_winograd(g, as_images<const Bfloat16>(g, g.in, source),
                                        as_images<const Bfloat16>(g, g.out, upstream), weight_gradient, bias_gradient);
    } else {
      differentiate_weights_by_winograd(g, as_images<const float>(g, g.in, source),
                                        as_images<const float>(g, g.out, upstream), weight_gradient, bias_gradient);
    }
  } else {
    const auto& [chosen, primitive] = convolution.weight_gradient();
    const memory source = in_layout(wrap(plain(image), x), chosen.src_desc());
    upstream = in_layout(upstream, chosen.diff_dst_desc());
    const memory result = wrap(plain(weights), weight_gradient);
    const bool directly = result.get_desc() == chosen.diff_weights_desc();
    const memory computed = directly ? result : allocate(chosen.diff_weights_desc());
    execute(primitive, chosen.scratchpad_desc(),
            {{DNNL_ARG_SRC, source},
             {DNNL_ARG_DIFF_DST, upstream},
             {DNNL_ARG_DIFF_WEIGHTS, computed},
             {DNNL_ARG_DIFF_BIAS, wrap(plain({g.out}), bias_gradient)}});
    if (!directly) convert(computed, result);
  }
  const Geometry backward{g.n, g.out, g.in, g.h, g.w, g.stride, g.dilation, kNothing, g.bfloat16, 0};
  if (suits_winograd(backward)) {
    float* turned = scratch.floats(g.in * g.out * kTaps);
    turn_weights(weight, g.out, g.in, 0, g.in, turned, g.out);
    convolve_by_winograd(backward, upstream, turned, nullptr, wrap(plain(image), x_gradient));
    return;
  }
  const auto& [chosen, primitive] = convolution.input_gradient();
  const memory weights_there = in_layout(wrap(plain(weights), weight), chosen.weights_desc());
  const memory result = wrap(plain(image), x_gradient);
  const bool directly = result.get_desc() == chosen.diff_src_desc();
  const memory computed = directly ? result : allocate(chosen.diff_src_desc());
  execute(primitive, chosen.scratchpad_desc(),
          {{DNNL_ARG_DIFF_DST, in_layout(upstream, chosen.diff_dst_desc())},
           {DNNL_ARG_WEIGHTS, weights_there},
           {DNNL_ARG_DIFF_SRC, computed}});
  if (!directly) convert(computed, result);
}

constexpr TensorSpec kX{"x", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kWeight{"weight", "float32", 4, {kOut, kC, 3, 3}};
constexpr TensorSpec kBias{"bias", "float32", 1, {kOut}};
constexpr TensorSpec kSettings{"settings", "int32", 1, {4}};
constexpr TensorSpec kY{"y", "float32", 4, {kN, kOut, kOutH, kOutW}};
constexpr TensorSpec kGradient{"gradient", "float32", 4, {kN, kOut, kOutH, kOutW}};
constexpr TensorSpec kXGradient{"x_gradient", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kWeightGradient{"weight_gradient", "float32", 4, {kOut, kC, 3, 3}};
constexpr TensorSpec kBiasGradient{"bias_gradient", "float32", 1, {kOut}};

}  // namespace

// Whether the processor multiplies bfloat16 numbers; oneDNN would imitate that otherwise.
extern "C" int has_bfloat16() {
  const auto wanted = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_bf16);
  return (static_cast<unsigned>(dnnl::get_effective_cpu_isa()) & wanted) == wanted;
}

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
  return run(call, {kX, kWeight, kBias, kSettings, kY}, [&](const Sizes& sizes) {
    const float *x = call.data<float>(0), *weight = call.data<float>(1), *bias = call.data<float>(2);
    Geometry g;
    if (const Status status = read_geometry(call, sizes, call.data<int32_t>(3), 4, &g)) return status;
    if (is_flow(g)) {
      convolve_to_flow(x, weight, bias, call.data<float>(4), sizes);
    } else {
      convolve(g, x, weight, bias, call.data<float>(4));
    }
    return kOk;
  });
}

// x, weight, y, gradient of y, settings -> gradients of x, weight and bias
PWCNET_OPERATOR(Convolution3x3Gradient) {
  return run(call, {kX, kWeight, kY, kGradient, kSettings, kXGradient, kWeightGradient, kBiasGradient},
             [&](const Sizes& sizes) {
               const float *x = call.data<float>(0), *weight = call.data<float>(1), *gradient = call.data<float>(3);
               float *x_gradient = call.data<float>(5), *weight_gradient = call.data<float>(6),
                     *bias_gradient = call.data<float>(7);
               Geometry g;
               if (const Status status = read_geometry(call, sizes, call.data<int32_t>(4), 2, &g)) return status;
               if (is_flow(g)) {
                 convolve_to_flow_gradient(x, weight, gradient, x_gradient, weight_gradient, bias_gradient, sizes);
               } else {
                 convolve_gradient(g, x, weight, call.data<float>(2), gradient, x_gradient, weight_gradient,
                                   bias_gradient);
               }
               return kOk;
             });
}

}  // namespace pwcnet
