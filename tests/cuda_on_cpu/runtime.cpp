// As much of CUDA's runtime as MindSpore's GPU plugin needs, without a GPU.
//
// The device's memory is the host's, and everything is done at once. The other functions of CUDA's libraries that the
// plugin links to do nothing and return 0: tests/cuda_libraries.py defines them.
#include <cstddef>
#include <cstdlib>
#include <cstring>

// The first fields of CUDA 11's cudaDeviceProp.
struct DeviceProperties {
  char name[256], uuid[16], luid[8];
  unsigned luid_mask;
  size_t memory, shared_memory_per_block;
  int registers_per_block, warp_size;
  size_t memory_pitch;
  int threads_per_block, block[3], grid[3], clock_rate;
  size_t constant_memory;
  int major, minor;
  size_t texture_alignment, texture_pitch_alignment;
  int overlaps, multiprocessors;
};

constexpr size_t kMemory = size_t{1} << 33;

extern "C" {

int cudaGetDeviceCount(int* count) {
  *count = 1;
  return 0;
}

int cudaGetDeviceProperties(DeviceProperties* properties, int) {
  *properties = {"CPU", {}, {}, 0, kMemory, 48 << 10, 1 << 16, 32, 0, 1024, {1024, 1024, 64}, {1 << 30, 65535, 65535},
                 0,     0,  9,  0, 0,       0,        0,       132};
  return 0;
}

int cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = kMemory;
  return 0;
}

int cudaMalloc(void** memory, size_t size) {
  *memory = std::aligned_alloc(512, (size + 511) / 512 * 512);
  return *memory ? 0 : 2;
}

int cudaHostAlloc(void** memory, size_t size, unsigned) { return cudaMalloc(memory, size); }

int cudaFree(void* memory) {
  std::free(memory);
  return 0;
}

int cudaFreeHost(void* memory) { return cudaFree(memory); }

int cudaMemcpy(void* target, const void* source, size_t size, int) {
  std::memmove(target, source, size);
  return 0;
}

int cudaMemcpyAsync(void* target, const void* source, size_t size, int kind, void*) {
  return cudaMemcpy(target, source, size, kind);
}

int cudaMemset(void* target, int value, size_t size) {
  std::memset(target, value, size);
  return 0;
}

int cudaMemsetAsync(void* target, int value, size_t size, void*) { return cudaMemset(target, value, size); }

// MindSpore takes a null pointer for no stream.
int cudaStreamCreate(void** stream) {
  static char streams[1024];
  static int created = 0;
  *stream = &streams[created++ % 1024];
  return 0;
}

int cudaStreamCreateWithFlags(void** stream, unsigned) { return cudaStreamCreate(stream); }

int cudaStreamCreateWithPriority(void** stream, unsigned, int) { return cudaStreamCreate(stream); }

const char* cudaGetErrorString(int) { return "an error of tests/cuda_on_cpu"; }

const char* cudaGetErrorName(int) { return "an error of tests/cuda_on_cpu"; }

const char* cudnnGetErrorString(int) { return "an error of tests/cuda_on_cpu"; }

int cuInit(unsigned) { return 0; }

int cuDeviceGetCount(int* count) { return cudaGetDeviceCount(count); }

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}

}  // extern "C"
