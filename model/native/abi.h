// How MindSpore calls an ahead-of-time custom operator, and the checks that each call must pass.
//
// MindSpore hands over the inputs, then the outputs: address, rank, shape and dtype of each. Operators for the CPU and
// for CUDA state what they expect as a list of TensorSpec. A call that differs prints one line to stderr and returns a
// Status, which MindSpore puts into its own message. No framework header is included, so that a library does not depend
// on a version of MindSpore's C++ classes. The code is C++14, for old versions of nvcc.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "constants.h"

// Defines the exported function `name`; its body, which follows, gets the arguments as `const Call& call`.
#define PWCNET_OPERATOR(name)                                                                                    \
  static int run_##name(const Call& call);                                                                       \
  extern "C" int name(int count, void** params, int* ranks, int64_t** shapes, const char** dtypes, void* stream, \
                      void*) {                                                                                   \
    return run_##name(Call{#name, count, params, ranks, shapes, dtypes, stream});                                \
  }                                                                                                              \
  static int run_##name(const Call& call)

// Exports the operator `name` once more, as `other`: MindSpore gives all operators of a name the same gradient.
#define PWCNET_OPERATOR_ALIAS(other, name)                                                                        \
  extern "C" int other(int count, void** params, int* ranks, int64_t** shapes, const char** dtypes, void* stream, \
                       void*) {                                                                                   \
    return run_##name(Call{#other, count, params, ranks, shapes, dtypes, stream});                                \
  }

namespace pwcnet {

// What an operator returns. CUDA's own errors are added to kCudaError.
enum Status { kOk = 0, kTensorCount = 1, kDtype = 2, kShape = 3, kFailed = 4, kCudaError = 1000 };

struct Call {
  const char* name;
  int count;  // of inputs and outputs together
  void** params;
  const int* ranks;
  int64_t** shapes;
  const char** dtypes;
  void* stream;

  template <class T>
  T* data(int i) const {
    return static_cast<T*>(params[i]);
  }
};

// Sizes that tensors of one call share. The first tensor that has one sets it, the others must agree.
enum Symbol : int64_t {
  kN = -1,
  kC = -2,
  kH = -3,
  kW = -4,
  kOut = -5,
  kOutC = -6,
  kOutH = -7,
  kOutW = -8,
  kBlocks = -9,
  kOutBlocks = -10,
  kRows = -11
};

class Sizes {
 public:
  int64_t operator[](Symbol symbol) const { return values_[-1 - symbol]; }
  int64_t& operator[](Symbol symbol) { return values_[-1 - symbol]; }

 private:
  int64_t values_[11] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};  // -1: not set yet
};

struct TensorSpec {
  const char* name;
  const char* dtype;
  int rank;
  int64_t shape[6];  // sizes, or Symbols
};

inline std::string format_shape(const int64_t* shape, int rank) {
  std::string text = "(";
  for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + (shape[i] < 0 ? "any" : std::to_string(shape[i]));
  return text + ")";
}

inline Status fail_shape(const Call& call, const char* name, const int64_t* found, int rank, const int64_t* expected,
                         int expected_rank) {
  std::fprintf(stderr, "%s: %s has shape %s, expected %s\n", call.name, name, format_shape(found, rank).c_str(),
               format_shape(expected, expected_rank).c_str());
  return kShape;
}

// Checks one tensor and sets the sizes that no tensor before it has set.
inline Status check_tensor(const Call& call, int i, const TensorSpec& spec, Sizes* sizes) {
  if (std::strcmp(call.dtypes[i], spec.dtype) != 0) {
    std::fprintf(stderr, "%s: %s is %s, expected %s\n", call.name, spec.name, call.dtypes[i], spec.dtype);
    return kDtype;
  }
  const int64_t* found = call.shapes[i];
  int64_t expected[6];
  bool matches = call.ranks[i] == spec.rank;
  for (int axis = 0; axis < spec.rank; ++axis) {
    const int64_t size = spec.shape[axis];
    expected[axis] = size < 0 ? (*sizes)[static_cast<Symbol>(size)] : size;
    matches = matches && (expected[axis] < 0 || expected[axis] == found[axis]);
  }
  if (!matches) return fail_shape(call, spec.name, found, call.ranks[i], expected, spec.rank);
  int64_t pixels = 1;  // of the axes after the channels
  for (int axis = 0; axis < spec.rank; ++axis) {
    if (axis >= 2) pixels *= found[axis];
    if (found[axis] < 0 || found[axis] > kMaxPixels || pixels > kMaxPixels) {
      std::fprintf(stderr, "%s: %s has shape %s, expected at most %lld pixels an image\n", call.name, spec.name,
                   format_shape(found, spec.rank).c_str(), static_cast<long long>(kMaxPixels));
      return kShape;
    }
    if (spec.shape[axis] < 0) (*sizes)[static_cast<Symbol>(spec.shape[axis])] = found[axis];
  }
  return kOk;
}

// Checks number, dtypes, ranks and shapes of a call's tensors; `sizes` then has the value of each Symbol in the specs.
inline Status check(const Call& call, const std::vector<TensorSpec>& specs, Sizes* sizes) {
  if (call.count != static_cast<int>(specs.size())) {
    std::fprintf(stderr, "%s: %d tensors, expected %d\n", call.name, call.count, static_cast<int>(specs.size()));
    return kTensorCount;
  }
  int i = 0;
  for (const TensorSpec& spec : specs) {
    if (const Status status = check_tensor(call, i++, spec, sizes)) return status;
  }
  return kOk;
}

}  // namespace pwcnet
