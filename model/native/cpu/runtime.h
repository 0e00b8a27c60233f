// What operators for the CPU share: vectors, scratch memory, and the lock that lets one run at a time.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <vector>

#include "../abi.h"

namespace pwcnet {

constexpr int kLanes = 16;  // pixels handled together; the compiler maps them to the vectors of the machine
constexpr int kTaps = 9;    // of a 3x3 convolution

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

// Scratch memory, which is never given back: the system takes longer to hand out fresh pages than most operators take
// to run. It is one chunk, as large as any operator has needed so far; an operator that needs more gets further chunks.
class Scratch {
 public:
  struct Mark {
    size_t chunk, used;
  };

  // Frees everything.
  void restart() {
    if (chunks_.size() > 1) {
      size_t total = 0;
      for (const Chunk& chunk : chunks_) total += chunk.size;
      for (const Chunk& chunk : chunks_) std::free(chunk.data);
      chunks_.clear();
      append(total);
    }
    next_ = {0, 0};
  }

  void* take(size_t bytes) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    while (next_.chunk < chunks_.size() && next_.used + bytes > chunks_[next_.chunk].size) next_ = {next_.chunk + 1, 0};
    if (next_.chunk == chunks_.size()) append(bytes);
    void* data = static_cast<char*>(chunks_[next_.chunk].data) + next_.used;
    next_.used += bytes;
    return data;
  }

  float* floats(size_t count) { return static_cast<float*>(take(count * sizeof(float))); }

  // What is taken after a mark is free again when it is released.
  Mark mark() const { return next_; }
  void release(Mark mark) { next_ = mark; }

 private:
  struct Chunk {
    void* data;
    size_t size;
  };
  static constexpr size_t kAlignment = 4096, kHugePage = size_t(1) << 21;

  void append(size_t bytes) {
    const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* data = std::aligned_alloc(kHugePage, size);
    if (data == nullptr) throw std::bad_alloc();
    madvise(data, size, MADV_HUGEPAGE);
    chunks_.push_back({data, size});
  }

  std::vector<Chunk> chunks_;
  Mark next_ = {0, 0};
};

inline Scratch scratch;
inline std::mutex operator_mutex;

// Checks a call and runs an operator, `Status function(const Sizes&)`, alone: each uses all of OpenMP's threads and the
// scratch memory. An exception becomes a line on stderr and a status.
template <class Function>
int run(const Call& call, const std::vector<TensorSpec>& specs, Function function) {
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
