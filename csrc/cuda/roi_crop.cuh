// What the kernels of roi_crop share: sampling points as taps in shared memory, walks over many indices
// without a division, and elements as they are stored and as they are computed.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <limits>
#include <type_traits>

#include "../common/roi_region.h"
#include "device.cuh"

namespace {

// What elements stored as T are computed in.
template <class T>
using accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// N neighbouring elements, moved as one.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T x[N];
};

// One coordinate between the pixels `low` and `low + 1`, of which one may be outside; low is the map's size,
// so that both are, where the whole sample is.
template <class A>
struct Tap {
  int low;
  A weight_low, weight_high;
};

template <class A>
__device__ inline Tap<A> tap_at(double position, int64_t size) {
  int32_t low, high;
  Tap<A> tap;
  find_cell(position, size, low, high, tap.weight_low, tap.weight_high);
  tap.low = high < 0 ? static_cast<int>(size) : low;
  return tap;
}

// Column u of a region without rotation, and row v alike.
template <class A>
__device__ inline Tap<A> column_tap(const Region& r, int u, const CropShape& s) {
  return tap_at<A>(r.xx * numerator(u, s.out_width) / divisor(s.out_width, s.align_corners) + r.x0, s.width);
}
template <class A>
__device__ inline Tap<A> row_tap(const Region& r, int v, const CropShape& s) {
  return tap_at<A>(r.yy * numerator(v, s.out_height) / divisor(s.out_height, s.align_corners) + r.y0,
                   s.height);
}

// Point (u, v) of any region.
template <class A>
struct Point {
  Tap<A> x, y;
};
template <class A>
__device__ inline Point<A> point_at(const Region& r, int u, int v, const CropShape& s) {
  const double x = numerator(u, s.out_width), y = numerator(v, s.out_height),
               by_x = divisor(s.out_width, s.align_corners), by_y = divisor(s.out_height, s.align_corners);
  return {tap_at<A>(r.xx * x / by_x + r.xy * y / by_y + r.x0, s.width),
          tap_at<A>(r.yx * x / by_x + r.yy * y / by_y + r.y0, s.height)};
}

// The digits (a, b, c) of indices `first`, `first + step`, …, a < size_a and b < size_b being the fast ones.
class Odometer {
 public:
  int a, b, c;

  __device__ Odometer(int first, int step, int size_a, int size_b)
      : a(first % size_a),
        b(first / size_a % size_b),
        c(first / size_a / size_b),
        step_a_(step % size_a),
        step_b_(step / size_a % size_b),
        step_c_(step / size_a / size_b),
        size_a_(size_a),
        size_b_(size_b) {}

  __device__ void next() {
    a += step_a_, b += step_b_, c += step_c_;
    if (a >= size_a_) a -= size_a_, ++b;
    if (b >= size_b_) b -= size_b_, ++c;
  }

 private:
  int step_a_, step_b_, step_c_, size_a_, size_b_;
};

// Hands out pieces of shared memory, each aligned to 16 bytes; on the host it only counts.
struct Pieces {
  unsigned char* base;
  size_t used = 0;

  template <class T>
  __host__ __device__ T* take(int count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += (count * sizeof(T) + 15) / 16 * 16;
    return piece;
  }
};

template <class A>
__device__ inline A not_a_number() {
  return std::numeric_limits<A>::quiet_NaN();
}

}  // namespace
