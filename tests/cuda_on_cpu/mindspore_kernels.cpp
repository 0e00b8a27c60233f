// The kernels of MindSpore's GPU plugin that training, evaluation and prediction run, on the CPU.
//
// The plugin finds these functions in place of those of its libcuda_ops.so, with the same names and types. What each
// computes is known from MindSpore's operators. One that is missing here ends the process: tests/cuda_libraries.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda_fp16.h"

enum cudaError : int { kSuccess };
enum ReduceType_t : unsigned { kReduceSum = 0, kReduceMean = 4 };
enum ElwiseOpType : unsigned {
  kSqrt = 16,
  kInverseSqrt = 18,
  kSquare = 20,
  kNegate = 26,
  kSqrtGradient = 206,
  kInverseSqrtGradient = 207
};
enum BinaryOpType : unsigned {
  kGreater = 0,
  kGreaterEqual = 3,
  kMaximum = 8,
  kMinimum = 9,
  kAdd = 10,
  kSubtract = 11,
  kMultiply = 12,
  kDivide = 13,
  kPower = 14,
  kOtherDivide = 15  // they differ for integers alone
};
struct TransposeInfo {
  std::vector<int64_t> shape;
  std::vector<int32_t> axes;
};
struct CUstream_st;
using Stream = CUstream_st*;
using Size = unsigned long;
using Sizes = std::vector<unsigned long>;
using Shape = std::vector<long>;

namespace {

template <class T>
float read(T value) {
  return static_cast<float>(value);
}
float read(__half value) { return __half2float(value); }

template <class T>
T round_to(float value) {
  return static_cast<T>(value);
}
template <>
__half round_to(float value) {
  return __float2half(value);
}

template <class Extents>
Size count(const Extents& shape) {
  Size product = 1;
  for (const auto side : shape) product *= side;
  return product;
}

// Where element `i` of an array comes from in one of shape `shape` that is repeated to fill it: 0 along sides of 1.
template <class Extents>
Size repeated(Size i, const Extents& filled, const Extents& shape) {
  Size at = 0, stride = 1;
  for (size_t axis = filled.size(), left = shape.size(); axis-- > 0 && left-- > 0;) {
    at += i % filled[axis] % shape[left] * stride;
    stride *= shape[left];
    i /= filled[axis];
  }
  return at;
}

// Where element `i` of a slice of shape `slice` is in an array.
Size sliced(Size i, const Sizes& shape, const Shape& begin, const Shape& steps, const Sizes& slice) {
  Size at = 0, stride = 1;
  for (size_t axis = shape.size(); axis-- > 0;) {
    at += (begin[axis] + static_cast<long>(i % slice[axis]) * steps[axis]) * stride;
    stride *= shape[axis];
    i /= slice[axis];
  }
  return at;
}

// The two pixels that a resized one lies between, and the share of the second.
struct Neighbours {
  int first, second;
  float share;
  Neighbours(int pixel, float scale, bool half_pixels, int side) {
    const float at = half_pixels ? std::max((pixel + 0.5f) * scale - 0.5f, 0.0f) : pixel * scale;
    first = std::min(static_cast<int>(at), side - 1);
    second = std::min(first + 1, side - 1);
    share = at - first;
  }
};

}  // namespace

template <class A, class B>
cudaError Cast(int n, const A* x, B* y, Stream) {
  for (int i = 0; i < n; ++i) y[i] = round_to<B>(read(x[i]));
  return kSuccess;
}

template <class T>
cudaError FillDeviceArray(Size n, T* x, float value, Stream) {
  std::fill(x, x + n, round_to<T>(value));
  return kSuccess;
}

template <class T>
cudaError CalAssignAdd(Size n, T* x, const T* y, T* result, const unsigned&, Stream) {
  for (Size i = 0; i < n; ++i) result[i] = x[i] += y[i];
  return kSuccess;
}

template <class T>
cudaError CalAssignSub(Size n, T* x, const T* y, T* result, unsigned, Stream) {
  for (Size i = 0; i < n; ++i) result[i] = x[i] -= y[i];
  return kSuccess;
}

template <class T>
cudaError CalIsFinite(Size n, const T* x, bool* y, Stream) {
  for (Size i = 0; i < n; ++i) y[i] = std::isfinite(read(x[i]));
  return kSuccess;
}

template <class T>
cudaError CalSelect(const bool* condition, const T* x, const T* y, T* result, Size n, Stream) {
  for (Size i = 0; i < n; ++i) result[i] = condition[i] ? x[i] : y[i];
  return kSuccess;
}

template <ElwiseOpType kType, class A, class B>
cudaError UnaryOpsCudaFunc(Size n, const A* x, B* y, Stream) {
  for (Size i = 0; i < n; ++i) {
    switch (kType) {
      case kSqrt:
        y[i] = std::sqrt(x[i]);
        break;
      case kInverseSqrt:
        y[i] = 1 / std::sqrt(x[i]);
        break;
      case kSquare:
        y[i] = x[i] * x[i];
        break;
      case kNegate:
        y[i] = -x[i];
        break;
      default:
        std::abort();
    }
  }
  return kSuccess;
}

template <ElwiseOpType kType, class A, class B, class C>
cudaError BinaryOpsCudaFunc(Size n, const A* y, const B* dy, C* dx, Stream) {
  static_assert(kType == kSqrtGradient || kType == kInverseSqrtGradient, "");
  for (Size i = 0; i < n; ++i) dx[i] = kType == kSqrtGradient ? dy[i] / (2 * y[i]) : dy[i] * y[i] * y[i] * y[i] / -2;
  return kSuccess;
}

template <BinaryOpType kType, class A, class B, class C>
cudaError BinaryOpWithBroadcastCudaFunc(bool broadcasts, const Shape& shape_a, const Shape& shape_b, const Shape& shape,
                                        A* a, B* b, C* result, Size, Stream) {
  const bool one_a = count(shape_a) == 1, one_b = count(shape_b) == 1;
  for (Size i = 0; i < count(shape); ++i) {
    const float x = read(a[one_a ? 0 : broadcasts ? repeated(i, shape, shape_a) : i]);
    const float y = read(b[one_b ? 0 : broadcasts ? repeated(i, shape, shape_b) : i]);
    float value = 0;
    switch (kType) {
      case kGreater:
        value = x > y;
        break;
      case kGreaterEqual:
        value = x >= y;
        break;
      case kMaximum:
        value = std::max(x, y);
        break;
      case kMinimum:
        value = std::min(x, y);
        break;
      case kAdd:
        value = x + y;
        break;
      case kSubtract:
        value = x - y;
        break;
      case kMultiply:
        value = x * y;
        break;
      case kDivide:
      case kOtherDivide:
        value = x / y;
        break;
      case kPower:
        value = std::pow(x, y);
        break;
    }
    result[i] = round_to<C>(value);
  }
  return kSuccess;
}

template <class T>
cudaError BroadcastTo(const Shape& shape, const Shape& filled, T* x, T* y, Size, Stream) {
  for (Size i = 0; i < count(filled); ++i) y[i] = x[repeated(i, filled, shape)];
  return kSuccess;
}

template <class T>
cudaError CalTile(Sizes shape, Sizes filled, const T* x, T* y, Stream) {
  for (Size i = 0; i < count(filled); ++i) y[i] = x[repeated(i, filled, shape)];
  return kSuccess;
}

// The sum or mean over every other one of at most three axes, from the first or the second on.
template <class T>
cudaError ArrayReduce(T* x, const Sizes& shape, bool first, ReduceType_t type, T*, T* y, Stream) {
  if ((type != kReduceSum && type != kReduceMean) || shape.size() > 3) std::abort();
  Size sides[3] = {1, 1, 1}, kept[3];
  std::copy(shape.begin(), shape.end(), sides);
  for (int axis = 0; axis < 3; ++axis) kept[axis] = (axis % 2 == 0) == first ? 1 : sides[axis];
  std::vector<double> sums(kept[0] * kept[1] * kept[2]);
  for (Size i = 0; i < count(shape); ++i) {
    const Size place[3] = {i / sides[2] / sides[1], i / sides[2] % sides[1], i % sides[2]};
    sums[(place[0] % kept[0] * kept[1] + place[1] % kept[1]) * kept[2] + place[2] % kept[2]] += read(x[i]);
  }
  const Size terms = type == kReduceMean ? count(shape) / sums.size() : 1;
  for (Size i = 0; i < sums.size(); ++i) y[i] = round_to<T>(sums[i] / terms);
  return kSuccess;
}

template <class T>
cudaError CalBiasAddGradNCHW(Size n, Size channels, int height, int width, const T* gradient, T* result, Stream) {
  std::vector<double> sums(channels);
  for (Size i = 0; i < n; ++i) sums[i / height / width % channels] += read(gradient[i]);
  for (Size i = 0; i < channels; ++i) result[i] = round_to<T>(sums[i]);
  return kSuccess;
}

template <class T, bool kSimplify>
cudaError CalTranspose(Size n, const T* x, const TransposeInfo& info, T* y, Stream) {
  const size_t rank = info.axes.size();
  std::vector<Size> strides(rank, 1);
  for (size_t axis = rank - 1; axis > 0; --axis) strides[axis - 1] = strides[axis] * info.shape[axis];
  for (Size i = 0; i < n; ++i) {
    Size rest = i, at = 0;
    for (size_t axis = rank; axis-- > 0;) {
      const Size side = info.shape[info.axes[axis]];
      at += rest % side * strides[info.axes[axis]];
      rest /= side;
    }
    y[i] = x[at];
  }
  return kSuccess;
}

template <class T>
cudaError StridedSlice(const Sizes& shape, const Shape& begin, const Shape& steps, const Sizes& slice, const T* x, T* y,
                       Stream) {
  for (Size i = 0; i < count(slice); ++i) y[i] = x[sliced(i, shape, begin, steps, slice)];
  return kSuccess;
}

template <class T>
cudaError StridedSliceGrad(const Sizes& slice, const Shape& begin, const Shape& steps, const Sizes& shape, const T* dy,
                           T* dx, Stream) {
  for (Size i = 0; i < count(slice); ++i) dx[sliced(i, shape, begin, steps, slice)] = dy[i];
  return kSuccess;
}

template <class T>
cudaError Slice1DKernel(Size begin, Size size, Size, const T* x, T* y, const unsigned&, Stream) {
  std::copy(x + begin, x + begin + size, y);
  return kSuccess;
}

template <class T>
cudaError Slice4DKernel(Size b1, Size b2, Size b3, Size b4, Size s1, Size s2, Size s3, Size s4, Size d1, Size d2,
                        Size d3, Size d4, const T* x, T* y, const unsigned&, Stream) {
  const Shape begin{static_cast<long>(b1), static_cast<long>(b2), static_cast<long>(b3), static_cast<long>(b4)};
  return StridedSlice(Sizes{d1, d2, d3, d4}, begin, Shape{1, 1, 1, 1}, Sizes{s1, s2, s3, s4}, x, y, nullptr);
}

// `row` is the size of an array's part with all of the axis and those behind it, `inner` of those behind it.
template <class T>
cudaError SplitKernel(Size n, int part, int row, int inner, const T* x, T** parts, Stream) {
  for (Size i = 0; i < n; ++i) {
    const Size place = i % row / inner;
    parts[place / part][(i / row * part + place % part) * inner + i % inner] = x[i];
  }
  return kSuccess;
}

template <class T>
cudaError ConcatKernel(Size n, int, int row, int inner, int* sides, T** parts, T* y, Stream) {
  for (Size i = 0; i < n; ++i) {
    int place = i % row / inner, part = 0;
    for (; place >= sides[part]; ++part) place -= sides[part];
    y[i] = parts[part][(i / row * sides[part] + place) * inner + i % inner];
  }
  return kSuccess;
}

template <class T>
cudaError PackKernel(Size n, Size parts, Size inner, T** x, T* y, Stream) {
  for (Size i = 0; i < n; ++i) y[i] = x[i / inner % parts][i / inner / parts * inner + i % inner];
  return kSuccess;
}

template <class T>
cudaError UnpackKernel(Size n, Size parts, Size inner, T** y, const T* x, Stream) {
  for (Size i = 0; i < n; ++i) y[i / inner % parts][i / inner / parts * inner + i % inner] = x[i];
  return kSuccess;
}

template <class T>
cudaError CalResizeBilinear(const T* x, int n, int channels, int height, int width, int height_y, int width_y,
                            float scale_y, float scale_x, bool half_pixels, T* y, const unsigned&, Stream) {
  for (int plane = 0; plane < n * channels; ++plane, x += height * width) {
    for (int i = 0; i < height_y; ++i) {
      const Neighbours row(i, scale_y, half_pixels, height);
      for (int j = 0; j < width_y; ++j) {
        const Neighbours column(j, scale_x, half_pixels, width);
        const auto along = [&](int line) {
          return (1 - column.share) * x[line * width + column.first] + column.share * x[line * width + column.second];
        };
        *y++ = (1 - row.share) * along(row.first) + row.share * along(row.second);
      }
    }
  }
  return kSuccess;
}

template <class T>
cudaError CalResizeBilinearGrad(const T* dy, int n, int channels, int height_y, int width_y, int height, int width,
                                float scale_y, float scale_x, bool half_pixels, T* dx, T*, const unsigned&, Stream) {
  for (int plane = 0; plane < n * channels; ++plane, dx += height * width) {
    for (int i = 0; i < height_y; ++i) {
      const Neighbours row(i, scale_y, half_pixels, height);
      for (int j = 0; j < width_y; ++j, ++dy) {
        const Neighbours column(j, scale_x, half_pixels, width);
        dx[row.first * width + column.first] += (1 - row.share) * (1 - column.share) * *dy;
        dx[row.first * width + column.second] += (1 - row.share) * column.share * *dy;
        dx[row.second * width + column.first] += row.share * (1 - column.share) * *dy;
        dx[row.second * width + column.second] += row.share * column.share * *dy;
      }
    }
  }
  return kSuccess;
}

template <class T>
cudaError ApplyAdam(Size n, long, const T* gradient, const T* power1, const T* power2, const T* rate, const T* beta1,
                    const T* beta2, const T* epsilon, T* x, T* moment1, T* moment2, bool, Stream) {
  const float corrected = *rate * std::sqrt(1 - *power2) / (1 - *power1);
  for (Size i = 0; i < n; ++i) {
    moment1[i] += (gradient[i] - moment1[i]) * (1 - *beta1);
    moment2[i] += (gradient[i] * gradient[i] - moment2[i]) * (1 - *beta2);
    x[i] -= corrected * moment1[i] / (std::sqrt(moment2[i]) + *epsilon);
  }
  return kSuccess;
}

// The functions that the plugin looks for.
#define FOR_ANY_TYPE(T)                                                                                             \
  template cudaError CalTranspose<T, false>(Size, const T*, const TransposeInfo&, T*, Stream);                      \
  template cudaError CalTranspose<T, true>(Size, const T*, const TransposeInfo&, T*, Stream);                       \
  template cudaError StridedSlice<T>(const Sizes&, const Shape&, const Shape&, const Sizes&, const T*, T*, Stream); \
  template cudaError StridedSliceGrad<T>(const Sizes&, const Shape&, const Shape&, const Sizes&, const T*, T*,      \
                                         Stream);                                                                   \
  template cudaError Slice1DKernel<T>(Size, Size, Size, const T*, T*, const unsigned&, Stream);                     \
  template cudaError Slice4DKernel<T>(Size, Size, Size, Size, Size, Size, Size, Size, Size, Size, Size, Size,       \
                                      const T*, T*, const unsigned&, Stream);                                       \
  template cudaError SplitKernel<T>(Size, int, int, int, const T*, T**, Stream);                                    \
  template cudaError ConcatKernel<T>(Size, int, int, int, int*, T**, T*, Stream);                                   \
  template cudaError PackKernel<T>(Size, Size, Size, T**, T*, Stream);                                              \
  template cudaError UnpackKernel<T>(Size, Size, Size, T**, const T*, Stream);                                      \
  template cudaError BroadcastTo<T>(const Shape&, const Shape&, T*, T*, Size, Stream);                              \
  template cudaError CalTile<T>(Sizes, Sizes, const T*, T*, Stream);                                                \
  template cudaError CalSelect<T>(const bool*, const T*, const T*, T*, Size, Stream);                               \
  template cudaError FillDeviceArray<T>(Size, T*, float, Stream);
#define FOR_NUMBERS(T)                                                                                                \
  template cudaError CalIsFinite<T>(Size, const T*, bool*, Stream);                                                   \
  template cudaError ArrayReduce<T>(T*, const Sizes&, bool, ReduceType_t, T*, T*, Stream);                            \
  template cudaError CalBiasAddGradNCHW<T>(Size, Size, int, int, const T*, T*, Stream);                               \
  template cudaError BinaryOpWithBroadcastCudaFunc<kAdd, T, T, T>(bool, const Shape&, const Shape&, const Shape&, T*, \
                                                                  T*, T*, Size, Stream);
#define FOR_BINARY(TYPE, T, RESULT)                                                                                    \
  template cudaError BinaryOpWithBroadcastCudaFunc<TYPE, T, T, RESULT>(bool, const Shape&, const Shape&, const Shape&, \
                                                                       T*, T*, RESULT*, Size, Stream);
#define FOR_CAST(A, B) template cudaError Cast<A, B>(int, const A*, B*, Stream);

FOR_ANY_TYPE(float)
FOR_ANY_TYPE(__half)
FOR_ANY_TYPE(int)
FOR_ANY_TYPE(bool)
FOR_ANY_TYPE(unsigned char)
FOR_NUMBERS(float)
FOR_NUMBERS(__half)
FOR_BINARY(kGreater, float, bool)
FOR_BINARY(kGreater, unsigned char, bool)
FOR_BINARY(kGreaterEqual, int, bool)
FOR_BINARY(kMaximum, float, float)
FOR_BINARY(kMinimum, float, float)
FOR_BINARY(kAdd, int, int)
FOR_BINARY(kSubtract, float, float)
FOR_BINARY(kSubtract, int, int)
FOR_BINARY(kMultiply, float, float)
FOR_BINARY(kDivide, float, float)
FOR_BINARY(kPower, float, float)
FOR_BINARY(kOtherDivide, float, float)
FOR_CAST(bool, float)
FOR_CAST(bool, int)
FOR_CAST(unsigned char, float)
FOR_CAST(float, __half)
FOR_CAST(__half, float)
template cudaError CalAssignAdd<float>(Size, float*, const float*, float*, const unsigned&, Stream);
template cudaError CalAssignAdd<int>(Size, int*, const int*, int*, const unsigned&, Stream);
template cudaError CalAssignSub<float>(Size, float*, const float*, float*, unsigned, Stream);
template cudaError UnaryOpsCudaFunc<kSqrt, float, float>(Size, const float*, float*, Stream);
template cudaError UnaryOpsCudaFunc<kInverseSqrt, float, float>(Size, const float*, float*, Stream);
template cudaError UnaryOpsCudaFunc<kNegate, float, float>(Size, const float*, float*, Stream);
template cudaError UnaryOpsCudaFunc<kSquare, float, float>(Size, const float*, float*, Stream);
template cudaError BinaryOpsCudaFunc<kInverseSqrtGradient, float, float, float>(Size, const float*, const float*,
                                                                                float*, Stream);
template cudaError ApplyAdam<float>(Size, long, const float*, const float*, const float*, const float*, const float*,
                                    const float*, const float*, float*, float*, float*, bool, Stream);
template cudaError BinaryOpsCudaFunc<kSqrtGradient, float, float, float>(Size, const float*, const float*, float*,
                                                                         Stream);
template cudaError CalResizeBilinear<float>(const float*, int, int, int, int, int, int, float, float, bool, float*,
                                            const unsigned&, Stream);
template cudaError CalResizeBilinearGrad<float>(const float*, int, int, int, int, int, int, float, float, bool, float*,
                                                float*, const unsigned&, Stream);
