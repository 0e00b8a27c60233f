// The 3x3 convolution with bias, LeakyReLU and concatenation on the CPU by oneDNN, and its gradient.
//
// Defined by `Convolution` in model/layers.py. oneDNN computes in the layouts that it is fastest in.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <dnnl.hpp>
#include <list>
#include <map>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "../abi.h"
#include "flow_convolution.h"
#include "runtime.h"

namespace pwcnet {
namespace {

using dnnl::memory;

struct Geometry {
  int64_t n, in, out, h, w, stride, dilation, leaky, concatenate;

  int64_t out_h() const { return (h - 1) / stride + 1; }
  int64_t out_w() const { return (w - 1) / stride + 1; }
  int64_t total_out() const { return out + (concatenate ? in : 0); }
  bool is_flow() const { return out == kFlowChannels && stride == 1 && dilation == 1 && !leaky && !concatenate; }
  bool operator<(const Geometry& o) const {
    return std::tie(n, in, out, h, w, stride, dilation, leaky) <
           std::tie(o.n, o.in, o.out, o.h, o.w, o.stride, o.dilation, o.leaky);
  }
};

// Reads a call's settings and checks that its output `y` has the shape that follows from them.
Status read_geometry(const Call& call, const Sizes& sizes, const int32_t* settings, int y, Geometry* geometry) {
  const Geometry g{sizes[kN],   sizes[kC],   sizes[kOut], sizes[kH],  sizes[kW],
                   settings[0], settings[1], settings[2], settings[3]};
  if (g.stride < 1 || g.dilation < 1) {
    std::fprintf(stderr, "%s: stride is %d and dilation %d, expected 1 or more\n", call.name, settings[0], settings[1]);
    return kShape;
  }
  const int64_t expected[4] = {g.n, g.total_out(), g.out_h(), g.out_w()};
  if (!std::equal(expected, expected + 4, call.shapes[y])) return fail_shape(call, "y", call.shapes[y], 4, expected, 4);
  *geometry = g;
  return kOk;
}

dnnl::engine& engine() {
  static dnnl::engine instance(dnnl::engine::kind::cpu, 0);
  return instance;
}

dnnl::stream& stream() {
  static dnnl::stream instance(engine());
  return instance;
}

memory::desc plain(memory::dims dims) {
  const auto tag = dims.size() == 4 ? memory::format_tag::abcd : memory::format_tag::a;
  return memory::desc(dims, memory::data_type::f32, tag);
}

// NCHW images that are the first channels of images with `channels` of them.
memory::desc leading(memory::dims dims, int64_t channels) {
  const int64_t plane = dims[2] * dims[3];
  return memory::desc(dims, memory::data_type::f32, memory::dims{channels * plane, plane, dims[3], 1});
}

// The three primitives of a convolution; oneDNN chooses the layouts that it is fastest in.
struct Convolution {
  dnnl::convolution_forward::primitive_desc forward;
  dnnl::convolution_backward_data::primitive_desc x_gradient;
  dnnl::convolution_backward_weights::primitive_desc weight_gradient;
  dnnl::primitive run_forward, run_x_gradient, run_weight_gradient;

  explicit Convolution(const Geometry& g) {
    const memory::dims x{g.n, g.in, g.h, g.w}, weight{g.out, g.in, 3, 3}, bias{g.out};
    const memory::dims y{g.n, g.out, g.out_h(), g.out_w()};
    const memory::dims stride{g.stride, g.stride}, pad{g.dilation, g.dilation};
    const memory::dims dilation{g.dilation - 1, g.dilation - 1};
    const auto any = [](const memory::dims& dims) {
      return memory::desc(dims, memory::data_type::f32, memory::format_tag::any);
    };
    dnnl::primitive_attr attributes, fused;  // a copy would be the same object
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    fused.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (g.leaky) {
      dnnl::post_ops after;
      after.append_eltwise(dnnl::algorithm::eltwise_relu, kLeakySlope, 0.f);
      fused.set_post_ops(after);
    }
    const auto direct = dnnl::algorithm::convolution_direct;
    forward = {engine(),    dnnl::prop_kind::forward_training,
               direct,      any(x),
               any(weight), plain(bias),
               any(y),      stride,
               dilation,    pad,
               pad,         fused};
    x_gradient = {engine(), direct, any(x), any(weight), any(y), stride, dilation, pad, pad, forward, attributes};
    weight_gradient = {engine(), direct,   any(x), any(weight), plain(bias), any(y),
                       stride,   dilation, pad,    pad,         forward,     attributes};
    run_forward = dnnl::convolution_forward(forward);
    run_x_gradient = dnnl::convolution_backward_data(x_gradient);
    run_weight_gradient = dnnl::convolution_backward_weights(weight_gradient);
  }
};

// Keeps the most recently used convolutions; a network has about fifty per image size.
Convolution& find_convolution(const Geometry& geometry) {
  constexpr size_t kMaxConvolutions = 512;
  using Entry = std::pair<Geometry, Convolution>;
  static std::list<Entry> recent;  // the last used first
  static std::map<Geometry, std::list<Entry>::iterator> index;
  const auto found = index.find(geometry);
  if (found != index.end()) {
    recent.splice(recent.begin(), recent, found->second);
  } else {
    recent.emplace_front(geometry, Convolution(geometry));
    index.emplace(geometry, recent.begin());
    if (recent.size() > kMaxConvolutions) {
      index.erase(recent.back().first);
      recent.pop_back();
    }
  }
  return recent.front().second;
}

memory wrap(const memory::desc& desc, const void* data) { return memory(desc, engine(), const_cast<void*>(data)); }

memory allocate(const memory::desc& desc) { return wrap(desc, scratch.take(desc.get_size())); }

void convert(const memory& from, const memory& to, bool add = false) {
  dnnl::primitive_attr attributes;
  if (add) {
    dnnl::post_ops after;
    after.append_sum(1.f);
    attributes.set_post_ops(after);
  }
  dnnl::reorder(from, to, attributes).execute(stream(), const_cast<memory&>(from), const_cast<memory&>(to));
}

// The memory itself if it has the wanted layout, else a copy that has.
memory in_layout(const memory& from, const memory::desc& wanted) {
  if (from.get_desc() == wanted) return from;
  memory to = allocate(wanted);
  convert(from, to);
  return to;
}

void execute(const dnnl::primitive& primitive, const memory::desc& scratchpad,
             std::unordered_map<int, memory> arguments) {
  arguments.insert({DNNL_ARG_SCRATCHPAD, allocate(scratchpad)});
  primitive.execute(stream(), arguments);
  stream().wait();
}

void copy_planes(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t n, int64_t count) {
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t part = 0; part < 64; ++part) {
      const int64_t begin = count * part / 64, end = count * (part + 1) / 64;
      std::memcpy(to + i * to_stride + begin, from + i * from_stride + begin, (end - begin) * sizeof(float));
    }
}

void convolve(const Geometry& g, const float* x, const float* weight, const float* bias, float* out) {
  Convolution& convolution = find_convolution(g);
  const auto& chosen = convolution.forward;
  const memory::dims y{g.n, g.out, g.out_h(), g.out_w()};
  const memory source = in_layout(wrap(plain({g.n, g.in, g.h, g.w}), x), chosen.src_desc());
  const memory weights = in_layout(wrap(plain({g.out, g.in, 3, 3}), weight), chosen.weights_desc());
  const memory result = wrap(leading(y, g.total_out()), out);
  const bool directly = result.get_desc() == chosen.dst_desc();
  const memory computed = directly ? result : allocate(chosen.dst_desc());
  execute(convolution.run_forward, chosen.scratchpad_desc(),
          {{DNNL_ARG_SRC, source},
           {DNNL_ARG_WEIGHTS, weights},
           {DNNL_ARG_BIAS, wrap(plain({g.out}), bias)},
           {DNNL_ARG_DST, computed}});
  if (!directly) convert(computed, result);
  const int64_t plane = g.h * g.w;
  if (g.concatenate) copy_planes(x, g.in * plane, out + g.out * plane, g.total_out() * plane, g.n, g.in * plane);
}

void convolve_gradient(const Geometry& g, const float* x, const float* weight, const float* out, const float* gradient,
                       float* x_gradient, float* weight_gradient, float* bias_gradient) {
  Convolution& convolution = find_convolution(g);
  const memory::dims image{g.n, g.in, g.h, g.w}, weights{g.out, g.in, 3, 3};
  const memory::dims y{g.n, g.out, g.out_h(), g.out_w()};
  const int64_t plane = g.out_h() * g.out_w(), stride = g.total_out() * plane;

  memory upstream = wrap(leading(y, g.total_out()), gradient);
  if (g.leaky) {
    float* before = scratch.floats(g.n * g.out * plane);
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t i = 0; i < g.n; ++i)
      for (int64_t k = 0; k < g.out; ++k)
        for (int64_t p = 0; p < plane; ++p) {
          const int64_t at = i * stride + k * plane + p;
          before[(i * g.out + k) * plane + p] = gradient[at] * (out[at] > 0 ? 1.f : kLeakySlope);
        }
    upstream = wrap(plain(y), before);
  }
  {
    const auto& chosen = convolution.weight_gradient;
    const memory source = in_layout(wrap(plain(image), x), chosen.src_desc());
    upstream = in_layout(upstream, chosen.diff_dst_desc());
    const memory result = wrap(plain(weights), weight_gradient);
    const bool directly = result.get_desc() == chosen.diff_weights_desc();
    const memory computed = directly ? result : allocate(chosen.diff_weights_desc());
    execute(convolution.run_weight_gradient, chosen.scratchpad_desc(),
            {{DNNL_ARG_SRC, source},
             {DNNL_ARG_DIFF_DST, upstream},
             {DNNL_ARG_DIFF_WEIGHTS, computed},
             {DNNL_ARG_DIFF_BIAS, wrap(plain({g.out}), bias_gradient)}});
    if (!directly) convert(computed, result);
  }
  const auto& chosen = convolution.x_gradient;
  const memory weights_there = in_layout(wrap(plain(weights), weight), chosen.weights_desc());
  const memory result = wrap(plain(image), x_gradient);
  const bool directly = !g.concatenate && result.get_desc() == chosen.diff_src_desc();
  const memory computed = directly ? result : allocate(chosen.diff_src_desc());
  execute(convolution.run_x_gradient, chosen.scratchpad_desc(),
          {{DNNL_ARG_DIFF_DST, in_layout(upstream, chosen.diff_dst_desc())},
           {DNNL_ARG_WEIGHTS, weights_there},
           {DNNL_ARG_DIFF_SRC, computed}});
  if (g.concatenate)  // the input is also part of the output
    copy_planes(gradient + g.out * plane, stride, x_gradient, g.in * plane, g.n, g.in * plane);
  if (!directly) convert(computed, result, g.concatenate);
}

constexpr TensorSpec kX{"x", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kWeight{"weight", "float32", 4, {kOut, kC, 3, 3}};
constexpr TensorSpec kBias{"bias", "float32", 1, {kOut}};
constexpr TensorSpec kSettings{"settings", "int32", 1, {4}};
constexpr TensorSpec kY{"y", "float32", 4, {kN, kOutC, kOutH, kOutW}};
constexpr TensorSpec kGradient{"gradient", "float32", 4, {kN, kOutC, kOutH, kOutW}};
constexpr TensorSpec kXGradient{"x_gradient", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kWeightGradient{"weight_gradient", "float32", 4, {kOut, kC, 3, 3}};
constexpr TensorSpec kBiasGradient{"bias_gradient", "float32", 1, {kOut}};

}  // namespace

// x, weight, bias, settings (stride, dilation, LeakyReLU, concatenate) -> y
PWCNET_OPERATOR(Convolution3x3) {
  return run(call, {kX, kWeight, kBias, kSettings, kY}, [&](const Sizes& sizes) {
    const float *x = call.data<float>(0), *weight = call.data<float>(1), *bias = call.data<float>(2);
    Geometry geometry;
    if (const Status status = read_geometry(call, sizes, call.data<int32_t>(3), 4, &geometry)) return status;
    if (geometry.is_flow()) {
      convolve_to_flow(x, weight, bias, call.data<float>(4), sizes);
    } else {
      convolve(geometry, x, weight, bias, call.data<float>(4));
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
               Geometry geometry;
               if (const Status status = read_geometry(call, sizes, call.data<int32_t>(4), 2, &geometry)) return status;
               if (geometry.is_flow()) {
                 convolve_to_flow_gradient(x, weight, gradient, x_gradient, weight_gradient, bias_gradient, sizes);
               } else {
                 convolve_gradient(geometry, x, weight, call.data<float>(2), gradient, x_gradient, weight_gradient,
                                   bias_gradient);
               }
               return kOk;
             });
}

}  // namespace pwcnet
