// What the two directions of the graph-GRU share: who holds what, how blocks exchange rows, and how rows are
// mixed by S. docs/operators/graph_gru_cuda.md draws it.
//
// A group of blocks, one for each node, runs a tile of sequences through all steps. A block holds its node's
// matrices and its node's rows of the tile; a step has two exchanges, in which every block reads what all
// others published. On sm_90 a group is a cluster, published rows lie in shared memory and are read from
// there; elsewhere blocks of a cooperative launch publish in global memory, which the second cache serves.
#pragma once

#include "products.cuh"

namespace {

constexpr int kMostThreads = 384;
constexpr int kMostNodes = 16;  // blocks of a cluster

struct Walk {
  int nodes, channels, padded, order;  // padded: channels in whole 16s; order: K supports
  int64_t batch, steps;
  int groups;             // each of `nodes` blocks, taking tiles of sequences in turn
  int rows, turns;        // sequences of a tile; tiles of a group
  bool clusters;          // exchange within a cluster, else through global memory
  bool resident;          // packed matrices are kept in shared memory, else they stream from the second cache
  bool whole;             // rows of channels are whole, aligned vectors of four
  size_t theta_bytes;     // of a node
  const void* theta;      // (m, packed)
  const float* supports;  // (m, K, m)
  const int64_t* lengths;
  void* exchange;      // (groups, 2, m, elements), where there are no clusters
  unsigned* arrivals;  // (groups,), zero
};

// Elements from row to row in shared memory: the padding keeps rows off each other's banks.
template <class T>
__host__ __device__ constexpr int row_stride(int columns) {
  return columns + 16 / static_cast<int>(sizeof(T));
}

// Hands out 16-byte aligned pieces of shared memory.
struct Carver {
  size_t used = 0;

  template <class T>
  __host__ __device__ size_t take(size_t count) {
    const size_t at = used;
    used += (count * sizeof(T) + 15) / 16 * 16;
    return at;
  }
};

// N values of a row in global memory, which ends after `columns`; beyond them values are zero.
template <int N, class T>
__device__ inline Values<N> load_row(const T* row, int column, int columns, bool whole) {
  if (whole && column < columns) return load<N>(row + column);
  Values<N> values;
#pragma unroll
  for (int i = 0; i < N; ++i) values.x[i] = column + i < columns ? static_cast<float>(row[column + i]) : 0.0f;
  return values;
}

template <int N, class T>
__device__ inline void store_row(T* row, int column, int columns, bool whole, const Values<N>& values) {
  if (whole && column < columns) return store<N>(row + column, values);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (column + i < columns) row[column + i] = static_cast<T>(values.x[i]);
}

// The blocks of a group, from the view of one of them.
template <class T>
class Group {
 public:
  const int index, node;

  // `room`: this block's two buffers of `elements` in shared memory, where the group is a cluster.
  __device__ Group(const Walk& walk, T* room, int elements)
      : index(blockIdx.x / walk.nodes), node(blockIdx.x % walk.nodes), walk_(walk), elements_(elements) {
    if (walk.clusters)
      published_ = room;
    else
      published_ = static_cast<T*>(walk.exchange) + static_cast<int64_t>(index) * 2 * walk.nodes * elements;
  }

  // Where this block publishes.
  __device__ T* mine(int buffer) const {
    return published_ +
           static_cast<int64_t>(walk_.clusters ? buffer : buffer * walk_.nodes + node) * elements_;
  }

  // Everything published before is read after, and everything read before may be published over after.
  __device__ void sync() {
    if (walk_.clusters)
      cluster_sync();
    else
      grid_sync(walk_.arrivals + index, turn_ += walk_.nodes);
  }

  // Σ_j weights[j] · published by node j, four elements from `offset` on. Rows are as far away as another
  // multiprocessor, so several are asked for before the first is used.
  __device__ Values<4> weighted_sum(int buffer, int offset, const float* weights) const {
    constexpr int kAhead = 6;
    Values<4> sum = {};
#pragma unroll 1
    for (int first = 0; first < walk_.nodes; first += kAhead) {
      Packed<4, T> rows[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (first + j < walk_.nodes)
          rows[j] = *reinterpret_cast<const Packed<4, T>*>(published(buffer, first + j) + offset);
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (first + j < walk_.nodes)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum.x[i] += weights[first + j] * static_cast<float>(rows[j].x[i]);
    }
    return sum;
  }

 private:
  __device__ const T* published(int buffer, int j) const {
    if (walk_.clusters) return in_block(published_ + static_cast<int64_t>(buffer) * elements_, j);
    return published_ + static_cast<int64_t>(buffer * walk_.nodes + j) * elements_;
  }

  const Walk& walk_;
  const int elements_;
  T* published_;
  unsigned turn_ = 0;
};

// This node's packed matrices: in shared memory from now on, or where they lie.
__device__ inline const unsigned char* take_theta(const Walk& walk, int node, unsigned char* room) {
  const unsigned char* theta = static_cast<const unsigned char*>(walk.theta) + node * walk.theta_bytes;
  if (!walk.resident) return theta;
  for (size_t at = threadIdx.x * 16; at < walk.theta_bytes; at += blockDim.x * 16)
    *reinterpret_cast<uint4*>(room + at) = *reinterpret_cast<const uint4*>(theta + at);
  return room;
}

// Rows that no sequence fills are zero, so that nothing is made of what lay there.
template <class T>
__device__ inline void clear(T* room, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) room[i] = static_cast<T>(0.0f);
}

__device__ inline float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}

}  // namespace
