// The update of all weights by Adam in one pass over memory, and the norm that decides about it.
//
// Not operators of a graph: train/update.py calls them with the addresses of MindSpore's tensors. An update reads
// and writes so much memory, and computes so little, that each further pass over it shows in the time of a step.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kChunk = 1 << 14;  // elements that one thread handles at a time

int64_t chunks(int64_t size) { return (size + kChunk - 1) / kChunk; }

}  // namespace

// The numbers that do not differ between weights; the names are those of train/update.py.
struct AdamSettings {
  float factor;           // of the gradient
  float decay;            // share of the weight added to its gradient
  float beta1, beta2;     // decay of the moments
  float rate;             // learning rate, corrected for moments that started at zero
  float epsilon;          // added to the root of the second moment
  float decoupled_decay;  // share of the weight that is subtracted from it
  float ema_decay;        // of the moving average of the weights
  int32_t clear;          // whether the gradient becomes zero
};

// The sum of squares in float64. Its bits do not depend on the number of threads.
extern "C" double sum_of_squares(const float* x, int64_t size) {
  std::vector<double> sums(chunks(size));
#pragma omp parallel for schedule(static)
  for (int64_t chunk = 0; chunk < chunks(size); ++chunk) {
    double sum = 0;
    const int64_t end = std::min(size, (chunk + 1) * kChunk);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = chunk * kChunk; i < end; ++i) sum += double(x[i]) * x[i];
    sums[chunk] = sum;
  }
  double sum = 0;
  for (double part : sums) sum += part;
  return sum;
}

// Updates `count` weights of so many elements. Gradient, moments and `offset`, the moving average minus the weights (or
// null), are of all weights, one after the other.
extern "C" void adam(int64_t count, float** weights, const int64_t* sizes, float* gradient, float* moment1,
                     float* moment2, float* offset, const AdamSettings* settings) {
  struct Chunk {
    float* weight;
    int64_t start, size;
  };
  std::vector<Chunk> all;
  int64_t start = 0;
  for (int64_t k = 0; k < count; start += sizes[k++])
    for (int64_t i = 0; i < sizes[k]; i += kChunk)
      all.push_back({weights[k] + i, start + i, std::min(kChunk, sizes[k] - i)});
  const AdamSettings s = *settings;
#pragma omp parallel for schedule(static)
  for (size_t k = 0; k < all.size(); ++k) {
    const Chunk chunk = all[k];
    float* __restrict w = chunk.weight;
    float* __restrict g = gradient + chunk.start;
    float* __restrict m = moment1 + chunk.start;
    float* __restrict v = moment2 + chunk.start;
    for (int64_t i = 0; i < chunk.size; ++i) {
      const float slope = g[i] * s.factor + s.decay * w[i];
      m[i] += (1 - s.beta1) * (slope - m[i]);
      v[i] += (1 - s.beta2) * (slope * slope - v[i]);
      const float change = -s.rate * m[i] / (std::sqrt(v[i]) + s.epsilon) - s.decoupled_decay * w[i];
      // average' - weight' = decay (average - weight'), weight' = weight + change
      if (offset) offset[chunk.start + i] = (offset[chunk.start + i] - change) * s.ema_decay;
      w[i] += change;
      if (s.clear) g[i] = 0;
    }
  }
}
