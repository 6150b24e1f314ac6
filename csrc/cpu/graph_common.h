// What graph_conv.cpp and graph_gru.cpp share on the side of tensors: the door through which tensors become
// padded arrays, the workspace, and the structures that the kernels (graph_kernels.h, graph_thetas.h) read.
#pragma once

#include <sched.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Channels are padded to whole 64-byte vectors at every instruction-set level, so that no kernel has a tail.
template <class T>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t granule = 64 / sizeof(T);
  return (n + granule - 1) / granule * granule;
}

// How far apart matrices of n elements lie. At a distance of whole pages the same row of all of them would
// meet in one set of the first cache: then a backward of graph_conv took 0.37 to 0.52 ms, by where its memory
// lay.
template <class T>
constexpr int64_t apart(int64_t n) {
  return padded<T>(n) + 256 / sizeof(T);
}

// Whether kernels read and write tensors of this dtype as they are, in bfloat16: where rows need no padding.
template <class T>
bool stored_low(ScalarType dtype, std::initializer_list<int64_t> columns) {
  return dtype == ScalarType::BFloat16 &&
         std::all_of(columns.begin(), columns.end(), [](int64_t n) { return n == padded<T>(n); });
}

// Whether products take bfloat16 factors: on CPUs with bfloat16 dot products, where rows of Θ come in whole
// pairs.
inline bool in_pairs(ScalarType dtype, std::initializer_list<int64_t> rows) {
  const bool even = std::all_of(rows.begin(), rows.end(), [](int64_t n) { return n % 2 == 0; });
  return even && dtype == ScalarType::BFloat16 && aufast::isa() >= aufast::Isa::avx512_bf16;
}

// The same for the backward. AMX takes its factors with the sum's index innermost, and where there is AMX,
// vdpbf16ps is no faster than float: the backward stays in float there.
inline bool backward_in_pairs(ScalarType dtype, std::initializer_list<int64_t> rows) {
  return in_pairs(dtype, rows) && aufast::isa() == aufast::Isa::avx512_bf16;
}

// A member's place in a crew (crew.h); alone on its cache lines.
struct alignas(128) CrewSeat {
  uint64_t word;
  int arrived;
};

// Hands out 64-byte aligned pieces of one allocation. A first pass without memory only counts.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    char* piece = base == nullptr ? nullptr : base + used;
    used += (count * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
    return reinterpret_cast<T*>(piece);
  }
};

// The graph of U: similarity R = ReLU(U Uᵀ), adjacency N(R) or softmax(R), and the supports S_0 … S_{K-1},
// rows padded.
template <class T>
struct Graph {
  int64_t nodes, embeddings, order;
  bool softmax;
  int64_t row;  // padded(nodes)
  const T* U;
  T* transposed_U = nullptr;     // (ce, row)
  T* similarity = nullptr;       // (m, row)
  T* adjacency = nullptr;        // (m, row)
  T* row_sums = nullptr;         // (m)
  T* supports = nullptr;         // (K, m, row)
  T* grad_supports = nullptr;    // (K, m, row), backward only, zeroed
  T* grad_similarity = nullptr;  // (m, row), backward only
  T* padded_U = nullptr;         // (m, padded(ce)), backward only
  T* grad_U = nullptr;           // (m, padded(ce)), a result, null where it is not wanted

  int64_t matrix() const { return nodes * row; }

  void plan(Arena& arena, bool backward) {
    transposed_U = arena.take<T>(embeddings * row);
    similarity = arena.take<T>(matrix());
    adjacency = arena.take<T>(matrix());
    row_sums = arena.take<T>(nodes);
    supports = arena.take<T>(order * matrix());
    if (!backward) return;
    grad_supports = arena.take<T>(order * matrix());
    grad_similarity = arena.take<T>(matrix());
    padded_U = arena.take<T>(nodes * padded<T>(embeddings));
  }
};

constexpr int64_t kMostNodes = 8;    // nodes that are mixed together: one register tile of rows
constexpr int64_t kPoolRows = 32;    // pool rows in one work item: a few hundred kilobytes of weights
constexpr int64_t kTransposed = 16;  // columns transposed together: a row's cache line

// A pool of weights (ce, rows, columns) whose node matrices Θ_i = Σ_e Q_ie W_e lie at `theta` inside each
// node's block. The weights are read as T or, where `low` is given, as bfloat16.
template <class T>
struct Pool {
  const T* weights;
  T* grad;
  int64_t rows;
  int64_t theta;
  const uint16_t* low = nullptr;
  uint16_t* low_grad = nullptr;  // in place of grad, where the gradient is written as it is stored
};

// All node matrices of an operator. Without Q one matrix serves all nodes: one embedding, whose coordinate is
// 1 everywhere.
template <class T>
struct Thetas {
  int64_t nodes, distinct;      // distinct: node matrices that differ, m or 1
  int64_t embeddings, columns;  // columns padded, the same for all pools
  const T* Q;
  int pools;
  Pool<T> pool[6];
  int64_t block;    // elements of a node's block
  T* theta;         // (distinct, block); in the backward the transposed ones
  uint32_t* pairs;  // the same as bfloat16 pairs of rows, in place of theta; null where float is used
  bool tiles;       // with pairs: multiply by matrix tiles
  T* grad_theta;    // (m, block), backward only
  T* partial_Q;     // (pool blocks, m, ce), backward only
  T* grad_Q;        // (m, ce), null where it is not wanted

  int64_t stride() const { return distinct == 1 ? 0 : block; }
  int64_t blocks() const {
    int64_t count = 0;
    for (int k = 0; k < pools; ++k) count += (pool[k].rows + kPoolRows - 1) / kPoolRows;
    return count;
  }
};

// A pool's matrices transposed: from weights (ce, segments, rows, columns) to Θᵀ_i (segments, live columns,
// rows). Rows come in two runs, each padded: `first` of them (the state), then `second` (the input); a
// segment of the pool may have `others` beside them. `live` columns are no padding.
template <class T>
struct TransposedPool {
  const T* weights;
  int64_t segments, first, second, columns, live;
  int64_t theta;  // offset in a node's block
  int64_t block;  // elements of a node's block
  const uint16_t* low = nullptr;
  int64_t others = 0;

  int64_t row() const { return padded<T>(first) + padded<T>(second); }
  int64_t size() const { return segments * live * row(); }
  int64_t blocks() const { return segments * ((live + kTransposed - 1) / kTransposed); }
};

}  // namespace
