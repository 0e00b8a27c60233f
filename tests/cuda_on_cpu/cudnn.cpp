// As much of cuDNN as MindSpore's convolutions need, on the CPU; numbers are multiplied and added in float32.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda_fp16.h"

namespace {

enum Status { kSuccess, kNotSupported = 9 };
enum DataType { kFloat = 0, kHalf = 2 };
enum Format { kNCHW = 0, kNHWC = 1 };

// Of a tensor, a filter or a convolution.
struct Descriptor {
  int type, format;
  int size[4];  // N, C, H, W, or output channels, input channels, H, W
  int padding[2], stride[2], dilation[2];

  size_t count() const { return static_cast<size_t>(size[0]) * size[1] * size[2] * size[3]; }
};

Status set(Descriptor* tensor, int type, int format, int rank, const int* size) {
  if (rank != 4 || (type != kFloat && type != kHalf)) return kNotSupported;
  *tensor = {type, format, {size[0], size[1], size[2], size[3]}, {}, {}, {}};
  return kSuccess;
}

std::vector<float> load(const Descriptor* tensor, const void* data) {
  std::vector<float> values(tensor->count());
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] =
        tensor->type == kHalf ? __half2float(static_cast<const __half*>(data)[i]) : static_cast<const float*>(data)[i];
  }
  return values;
}

Status store(const Descriptor* tensor, void* data, const std::vector<float>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (tensor->type == kHalf) {
      static_cast<__half*>(data)[i] = __float2half(values[i]);
    } else {
      static_cast<float*>(data)[i] = values[i];
    }
  }
  return kSuccess;
}

float* row(std::vector<float>& values, const Descriptor* tensor, size_t i, int j, int k) {
  return values.data() + ((i * tensor->size[1] + j) * tensor->size[2] + k) * tensor->size[3];
}

// Calls step(a row of x, a weight, a row of y, first, end, stride) for every product of a weight with a row: x is read
// or written at stride * i, y at i, for i from `first` to `end`.
template <class Step>
void convolve(const Descriptor* x, std::vector<float>& x_values, const Descriptor* weight,
              std::vector<float>& weight_values, const Descriptor* convolution, const Descriptor* y,
              std::vector<float>& y_values, const Step& step) {
  const int stride = convolution->stride[1], width = x->size[3];
  for (int sample = 0; sample < y->size[0]; ++sample) {
    for (int out = 0; out < weight->size[0]; ++out) {
      for (int in = 0; in < weight->size[1]; ++in) {
        for (int i = 0; i < weight->size[2]; ++i) {
          for (int line = 0; line < y->size[2]; ++line) {
            const int above = line * convolution->stride[0] - convolution->padding[0] + i * convolution->dilation[0];
            if (above < 0 || above >= x->size[2]) continue;
            for (int j = 0; j < weight->size[3]; ++j) {
              const int shift = j * convolution->dilation[1] - convolution->padding[1];
              int first = 0, end = y->size[3];
              while (first < end && first * stride + shift < 0) ++first;
              while (first < end && (end - 1) * stride + shift >= width) --end;
              step(row(x_values, x, sample, in, above) + shift, row(weight_values, weight, out, in, i)[j],
                   row(y_values, y, sample, out, line), first, end, stride);
            }
          }
        }
      }
    }
  }
}

}  // namespace

extern "C" {

#define CREATE(NAME)                  \
  int NAME(Descriptor** descriptor) { \
    *descriptor = new Descriptor{};   \
    return kSuccess;                  \
  }
CREATE(cudnnCreateTensorDescriptor)
CREATE(cudnnCreateFilterDescriptor)
CREATE(cudnnCreateConvolutionDescriptor)

int cudnnSetTensorNdDescriptor(Descriptor* tensor, int type, int rank, const int* size, const int* strides) {
  return set(tensor, type, strides[rank - 1] == 1 ? kNCHW : kNHWC, rank, size);
}

int cudnnSetTensorNdDescriptorEx(Descriptor* tensor, int format, int type, int rank, const int* size) {
  return set(tensor, type, format, rank, size);
}

int cudnnSetFilterNdDescriptor(Descriptor* filter, int type, int format, int rank, const int* size) {
  return set(filter, type, format, rank, size);
}

int cudnnSetConvolutionNdDescriptor(Descriptor* convolution, int, const int* padding, const int* stride,
                                    const int* dilation, int, int) {
  *convolution = {0, 0, {}, {padding[0], padding[1]}, {stride[0], stride[1]}, {dilation[0], dilation[1]}};
  return kSuccess;
}

int cudnnGetTensorSizeInBytes(const Descriptor* tensor, size_t* size) {
  *size = tensor->count() * (tensor->type == kHalf ? 2 : 4);
  return kSuccess;
}

int cudnnGetFilterSizeInBytes(const Descriptor* filter, size_t* size) {
  return cudnnGetTensorSizeInBytes(filter, size);
}

int cudnnConvolutionForward(void*, const void*, const Descriptor* x, const void* x_data, const Descriptor* weight,
                            const void* weight_data, const Descriptor* convolution, int, void*, size_t, const void*,
                            const Descriptor* y, void* y_data) {
  if (x->format != kNCHW) return kNotSupported;
  std::vector<float> x_values = load(x, x_data), weight_values = load(weight, weight_data), y_values(y->count());
  convolve(x, x_values, weight, weight_values, convolution, y, y_values,
           [](float* in, float& factor, float* out, int first, int end, int stride) {
             for (int i = first; i < end; ++i) out[i] += factor * in[i * stride];
           });
  return store(y, y_data, y_values);
}

int cudnnConvolutionBackwardData(void*, const void*, const Descriptor* weight, const void* weight_data,
                                 const Descriptor* y, const void* y_data, const Descriptor* convolution, int, void*,
                                 size_t, const void*, const Descriptor* x, void* x_data) {
  if (x->format != kNCHW) return kNotSupported;
  std::vector<float> x_values(x->count()), weight_values = load(weight, weight_data), y_values = load(y, y_data);
  convolve(x, x_values, weight, weight_values, convolution, y, y_values,
           [](float* in, float& factor, float* out, int first, int end, int stride) {
             for (int i = first; i < end; ++i) in[i * stride] += factor * out[i];
           });
  return store(x, x_data, x_values);
}

int cudnnConvolutionBackwardFilter(void*, const void*, const Descriptor* x, const void* x_data, const Descriptor* y,
                                   const void* y_data, const Descriptor* convolution, int, void*, size_t, const void*,
                                   const Descriptor* weight, void* weight_data) {
  if (x->format != kNCHW) return kNotSupported;
  std::vector<float> x_values = load(x, x_data), weight_values(weight->count()), y_values = load(y, y_data);
  convolve(x, x_values, weight, weight_values, convolution, y, y_values,
           [](float* in, float& factor, float* out, int first, int end, int stride) {
             float sum = 0;
             for (int i = first; i < end; ++i) sum += in[i * stride] * out[i];
             factor += sum;
           });
  return store(weight, weight_data, weight_values);
}

// The sum of a tensor and of one that may have sides of 1: a bias.
int cudnnOpTensor(void*, const void*, const void*, const Descriptor* x, const void* x_data, const void*,
                  const Descriptor* bias, const void* bias_data, const void*, const Descriptor* y, void* y_data) {
  std::vector<float> values = load(x, x_data), biases = load(bias, bias_data);
  if (bias->count() != static_cast<size_t>(y->size[1])) return kNotSupported;
  const size_t plane = static_cast<size_t>(y->size[2]) * y->size[3];
  for (size_t i = 0; i < values.size(); ++i) values[i] += biases[i / plane % biases.size()];
  return store(y, y_data, values);
}

}  // extern "C"
