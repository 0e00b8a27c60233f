// As much of CUDA's float16 as model/native/cuda uses, on the CPU; see cuda_runtime.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const uint32_t magnitude = value.bits & 0x7fff;
  float result = magnitude * 0x1p-24f;  // if subnormal; without subnormal floats, which MindSpore flushes to 0
  if (magnitude >= 0x400) {
    // The difference of the exponents' biases, or infinity and NaN.
    const uint32_t bits = (magnitude << 13) + (magnitude < 0x7c00 ? 112 << 23 : 0x70000000);
    std::memcpy(&result, &bits, sizeof bits);
  }
  return value.bits & 0x8000 ? -result : result;
}

inline __half __float2half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  value = std::fabs(value);
  if (std::isnan(value)) return {0x7fff};
  if (value >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (value < 0x1p-14f) return {static_cast<uint16_t>(sign | std::lrint(value * 0x1p24f))};
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits += 0xfff + (bits >> 13 & 1);  // round to nearest, ties to even
  return {static_cast<uint16_t>(sign | ((bits >> 13) - (112 << 10)))};
}
