// What operators for the CPU share: vectors, scratch memory, and the lock that lets one run at a time.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <mutex>
#include <new>
#include <vector>

#include "../abi.h"

namespace pwcnet {

constexpr int kLanes = 16;  // pixels handled together; the compiler maps them to the vectors of the machine

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline Vector load(const float* at) { return *reinterpret_cast<const Vector*>(at); }
inline void store(float* at, Vector value) { *reinterpret_cast<Vector*>(at) = value; }

// Stores the first `count` lanes, all of them if it is larger.
inline void store_part(float* at, Vector value, int64_t count) {
  if (count >= kLanes) {
    store(at, value);
  } else {
    float lanes[kLanes];
    store(lanes, value);
    std::memcpy(at, lanes, count * sizeof(float));
  }
}

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Blocks of scratch memory, taken in the same order by each operator and never freed: the system takes longer to hand
// out fresh pages than most operators take to run.
class Scratch {
 public:
  void restart() { next_ = 0; }

  void* take(size_t bytes) {
    if (next_ == blocks_.size()) blocks_.push_back({nullptr, 0});
    Block& block = blocks_[next_++];
    if (block.size < bytes) {
      std::free(block.data);
      constexpr size_t kHugePage = size_t(1) << 21;
      block.size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
      block.data = std::aligned_alloc(kHugePage, block.size);
      if (block.data == nullptr) {
        block.size = 0;
        throw std::bad_alloc();
      }
      madvise(block.data, block.size, MADV_HUGEPAGE);
    }
    return block.data;
  }

  float* floats(size_t count) { return static_cast<float*>(take(count * sizeof(float))); }

 private:
  struct Block {
    void* data;
    size_t size;
  };
  std::vector<Block> blocks_;
  size_t next_ = 0;
};

inline Scratch scratch;
inline std::mutex operator_mutex;

// Checks a call and runs an operator, `Status function(const Sizes&)`, alone: each uses all of OpenMP's threads and the
// scratch memory. An exception becomes a line on stderr and a status.
template <class Function>
int run(const Call& call, std::initializer_list<TensorSpec> specs, Function function) {
  Sizes sizes;
  if (const Status status = check(call, specs, &sizes)) return status;
  std::lock_guard<std::mutex> lock(operator_mutex);
  scratch.restart();
  try {
    return function(sizes);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", call.name, error.what());
    return kFailed;
  }
}

}  // namespace pwcnet
