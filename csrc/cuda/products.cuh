// Products of a few rows in shared memory with matrices that were packed for them: how float32, TF32,
// bfloat16 and float16 are multiplied, with one way to hold what is summed.
//
// A warp makes a strip: a few times eight rows by eight columns, of one matrix or of two side by side. Lane
// 4g + t holds the sums of rows g, g + 8, … and columns 2t and 2t + 1, as the tensor cores leave them.
//
// A packed matrix (depth × columns) is a run of strips, a strip a run of steps over the depth, and a step the
// words that each lane multiplies with, in the order of lanes: one load per lane and step, 16 bytes for two
// matrices. `aufast/ops/graph_gru_cuda.py` packs; `kStep` is the depth of a step.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "device.cuh"

namespace {

// N numbers of any type, as float32 in registers.
template <int N>
struct Values {
  float x[N];
};
template <int N, class T>
struct alignas(N * sizeof(T)) Packed {
  T x[N];
};

template <int N, class T>
__device__ inline Values<N> load(const T* from) {
  const Packed<N, T> packed = *reinterpret_cast<const Packed<N, T>*>(from);
  Values<N> values;
#pragma unroll
  for (int i = 0; i < N; ++i) values.x[i] = static_cast<float>(packed.x[i]);
  return values;
}

template <int N, class T>
__device__ inline void store(T* to, const Values<N>& values) {
  Packed<N, T> packed;
#pragma unroll
  for (int i = 0; i < N; ++i) packed.x[i] = static_cast<T>(values.x[i]);
  *reinterpret_cast<Packed<N, T>*>(to) = packed;
}

// A step's words of `kMatrices` matrices for one lane.
template <int kMatrices>
struct Words {
  uint32_t word[2 * kMatrices];
};
template <>
struct alignas(8) Words<1> {
  uint32_t word[2];
};
template <>
struct alignas(16) Words<2> {
  uint32_t word[4];
};

__device__ inline int lane_row() {
  return threadIdx.x % 32 / 4;
}
__device__ inline int lane_column() {
  return threadIdx.x % 4;
}

// Factors of 16 bits on the tensor cores.
template <class Number, void (*multiply)(float (&)[2], float (&)[2], const uint32_t (&)[4], const uint32_t*)>
struct TensorCores16 {
  using T = Number;
  static constexpr int kStep = 16, kLanes = 32, kLeastHalves = 2;
  static __device__ T narrow(float x) { return static_cast<T>(x); }

  template <int kMatrices, int kHalves>
  static __device__ void step(float (&sum)[kMatrices][kHalves][2], const T* a, int stride,
                              const Words<kMatrices>* b) {
    const Words<kMatrices> words = b[threadIdx.x % 32];
#pragma unroll
    for (int half = 0; half < kHalves; half += 2) {
      const T* corner = a + (8 * half + lane_row()) * stride + 2 * lane_column();
      const uint32_t rows[4] = {*reinterpret_cast<const uint32_t*>(corner),
                                *reinterpret_cast<const uint32_t*>(corner + 8 * stride),
                                *reinterpret_cast<const uint32_t*>(corner + 8),
                                *reinterpret_cast<const uint32_t*>(corner + 8 * stride + 8)};
#pragma unroll
      for (int i = 0; i < kMatrices; ++i) multiply(sum[i][half], sum[i][half + 1], rows, words.word + 2 * i);
    }
  }
};

using BFloat16 = TensorCores16<c10::BFloat16, mma_bf16>;
using Float16 = TensorCores16<c10::Half, mma_fp16>;

// float32 rounded to TF32 on the tensor cores.
struct Tf32 {
  using T = float;
  static constexpr int kStep = 8, kLanes = 32, kLeastHalves = 2;
  static __device__ T narrow(float x) { return round_tf32(x); }

  template <int kMatrices, int kHalves>
  static __device__ void step(float (&sum)[kMatrices][kHalves][2], const T* a, int stride,
                              const Words<kMatrices>* b) {
    const Words<kMatrices> words = b[threadIdx.x % 32];
#pragma unroll
    for (int half = 0; half < kHalves; half += 2) {
      const T* corner = a + (8 * half + lane_row()) * stride + lane_column();
      const uint32_t rows[4] = {*reinterpret_cast<const uint32_t*>(corner),
                                *reinterpret_cast<const uint32_t*>(corner + 8 * stride),
                                *reinterpret_cast<const uint32_t*>(corner + 4),
                                *reinterpret_cast<const uint32_t*>(corner + 8 * stride + 4)};
#pragma unroll
      for (int i = 0; i < kMatrices; ++i) mma_tf32(sum[i][half], sum[i][half + 1], rows, words.word + 2 * i);
    }
  }
};

// IEEE float32 on the FMA units: four elements of the depth per step. A word of 16 bytes has two columns of
// two matrices, or of two elements of the depth; the eight lanes that share t multiply with the same.
struct Ieee {
  using T = float;
  static constexpr int kStep = 4, kLanes = 16, kLeastHalves = 1;
  static __device__ T narrow(float x) { return x; }

  template <int kMatrices, int kHalves>
  static __device__ void step(float (&sum)[kMatrices][kHalves][2], const T* a, int stride,
                              const Words<kMatrices>* b) {
    Values<4> columns[2 * kMatrices], rows[kHalves];
#pragma unroll
    for (int i = 0; i < 2 * kMatrices; ++i)
      columns[i] = load<4>(reinterpret_cast<const float*>(b) + (4 * i + lane_column()) * 4);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) rows[half] = load<4>(a + (8 * half + lane_row()) * stride);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < kMatrices; ++i)
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int place = k * kMatrices + i;
            sum[i][half][e] += rows[half].x[k] * columns[place / 2].x[place % 2 * 2 + e];
          }
  }
};

// sum += a · b for one strip; a: rows in shared memory, `stride` apart, a packed strip at b.
template <class Product, int kMatrices, int kHalves>
__device__ void multiply_strip(float (&sum)[kMatrices][kHalves][2], const typename Product::T* a, int stride,
                               const void* b, int depth) {
  const Words<kMatrices>* words = static_cast<const Words<kMatrices>*>(b);
#pragma unroll 2
#pragma unroll
  for (int k = 0; k < depth; k += Product::kStep) {
    Product::step(sum, a + k, stride, words);
    words += Product::kLanes;
  }
}

// Bytes of one strip of `matrices` packed matrices.
template <class T>
__host__ __device__ constexpr size_t strip_bytes(int matrices, int depth) {
  return static_cast<size_t>(matrices) * depth * 8 * sizeof(T);
}

}  // namespace
