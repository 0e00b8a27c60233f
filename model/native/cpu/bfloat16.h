// bfloat16, the upper half of a float32: numbers in memory, vectors that become float32, and sums of products.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "runtime.h"

namespace pwcnet {

struct Bfloat16 {
  uint16_t bits;

  Bfloat16& operator=(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;  // to nearest even
    bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
    return *this;
  }
};

inline float to_float(float value) { return value; }
inline float to_float(Bfloat16 value) {
  const uint32_t word = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &word, sizeof(result));
  return result;
}

// Calls `function` with a zero of the type that it is to compute with.
template <class Function>
void with_number(bool bfloat16, Function function) {
  if (bfloat16) {
    function(Bfloat16{});
  } else {
    function(float{});
  }
}

typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t)), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(2), may_alias));

#ifdef __AVX512BF16__

inline Words widen(Halves halves) { return (Words)_mm512_cvtepu16_epi32((__m256i)halves); }

inline Halves round_to_bfloat16(Vector value) { return (Halves)_mm512_cvtneps_pbh((__m512)value); }

// Words of two numbers each.
inline Vector pair(Vector low, Vector high) {
  constexpr Words lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (Vector)_mm512_permutexvar_epi16((__m512i)(lanes | (lanes + kLanes) << 16), both);
}

// Adds the products of the first and of the second numbers of such words.
inline Vector add_pairs(Vector sum, Vector a, Vector b) {
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

#else  // the same, slower

inline Words widen(Halves halves) { return __builtin_convertvector(halves, Words); }

inline Halves round_to_bfloat16(Vector value) {
  const Words word = (Words)value, rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  return __builtin_convertvector(value == value ? rounded : Words{} + 0x7fc0, Halves);
}

inline Vector pair(Vector low, Vector high) {
  return (Vector)(widen(round_to_bfloat16(low)) | widen(round_to_bfloat16(high)) << 16);
}

inline Vector add_pairs(Vector sum, Vector a, Vector b) {
  const auto low = [](Vector words) { return (Vector)((Words)words << 16); };
  const auto high = [](Vector words) { return (Vector)((Words)words & 0xffff0000); };
  return sum + low(a) * low(b) + high(a) * high(b);
}

#endif

inline Vector load(const Bfloat16* at) { return (Vector)(widen(*reinterpret_cast<const Halves*>(at)) << 16); }
inline void store(Bfloat16* at, Vector value) { *reinterpret_cast<Halves*>(at) = round_to_bfloat16(value); }

// All lanes: the word at this place.
inline Vector broadcast(const float* word) {
  typedef uint32_t Word __attribute__((may_alias));
  return (Vector)(Words{} + *reinterpret_cast<const Word*>(word));
}

}  // namespace pwcnet
