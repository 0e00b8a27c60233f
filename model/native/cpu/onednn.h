// What the operators that use oneDNN share: its engine, memory in scratch blocks, and convolutions that are kept.
#pragma once

#include <cstdint>
#include <dnnl.hpp>
#include <list>
#include <map>
#include <unordered_map>
#include <utility>

#include "runtime.h"

namespace pwcnet {

using dnnl::memory;

inline dnnl::engine& engine() {
  static dnnl::engine instance(dnnl::engine::kind::cpu, 0);
  return instance;
}

inline dnnl::stream& stream() {
  static dnnl::stream instance(engine());
  return instance;
}

// Whether oneDNN may use an instruction set: the processor has it, and ONEDNN_MAX_CPU_ISA does not exclude it.
inline bool has_isa(dnnl::cpu_isa wanted) {
  static const auto isa = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
  return (isa & static_cast<unsigned>(wanted)) == static_cast<unsigned>(wanted);
}

inline memory::desc plain(memory::dims dims) {
  const auto tag = dims.size() == 4 ? memory::format_tag::abcd : memory::format_tag::a;
  return memory::desc(dims, memory::data_type::f32, tag);
}

// NCHW images that are some of the channels of images with `channels` of them.
inline memory::desc part(memory::dims dims, int64_t channels) {
  const int64_t plane = dims[2] * dims[3];
  return memory::desc(dims, memory::data_type::f32, memory::dims{channels * plane, plane, dims[3], 1});
}

inline memory wrap(const memory::desc& desc, const void* data) {
  return memory(desc, engine(), const_cast<void*>(data));
}

inline memory allocate(const memory::desc& desc) { return wrap(desc, scratch.take(desc.get_size())); }

inline void convert(const memory& from, const memory& to) {
  dnnl::reorder(from, to).execute(stream(), const_cast<memory&>(from), const_cast<memory&>(to));
}

// The memory itself if it has the wanted layout, else a copy that has.
inline memory in_layout(const memory& from, const memory::desc& wanted) {
  if (from.get_desc() == wanted) return from;
  memory to = allocate(wanted);
  convert(from, to);
  return to;
}

// Calls `write` with memory of a layout: the result itself if it has that, else scratch memory, which is then
// converted.
template <class Function>
void write_in_layout(const memory& result, const memory::desc& layout, Function write) {
  if (result.get_desc() == layout) {
    write(result);
    return;
  }
  const memory written = allocate(layout);
  write(written);
  convert(written, result);
}

inline void execute(const dnnl::primitive& primitive, const memory::desc& scratchpad,
                    std::unordered_map<int, memory> arguments) {
  arguments.insert({DNNL_ARG_SCRATCHPAD, allocate(scratchpad)});
  primitive.execute(stream(), arguments);
  stream().wait();
}

// Keeps the most recently used of what is expensive to make.
template <class Key, class Value>
class Cache {
 public:
  Value& find(const Key& key) {
    const auto found = index_.find(key);
    if (found != index_.end()) {
      recent_.splice(recent_.begin(), recent_, found->second);
    } else {
      recent_.emplace_front(key, Value(key));
      index_.emplace(key, recent_.begin());
      if (recent_.size() > kMaxEntries) {
        index_.erase(recent_.back().first);
        recent_.pop_back();
      }
    }
    return recent_.front().second;
  }

 private:
  static constexpr size_t kMaxEntries = 512;  // a network has about fifty convolutions per image size
  using Entry = std::pair<Key, Value>;
  std::list<Entry> recent_;  // the last used first
  std::map<Key, typename std::list<Entry>::iterator> index_;
};

}  // namespace pwcnet
