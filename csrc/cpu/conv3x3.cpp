// Grouped 3×3 convolutions on the CPU, stride 1 and zero padding 1, by Winograd's minimal filtering
// F(2×2, 3×3): 16 products give four results, where the sum over taps takes 36.
//
// The maps of a network (a group) are cut into rows of tiles, those of all images in one sequence, and the
// sequence into blocks, as many rows as stay in the second cache. A block goes through points, products and
// results. Of many networks each is one item of work, which makes its filters' points for itself; the filters
// of a few are made first, by all threads, and the blocks are the items. Every sum has one order, whoever
// takes it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "dense.h"
#include "isa.h"
#include "pages.h"

namespace {

// A map's height and width, and elements from row to row and from pixel to pixel.
struct MapSize {
  int64_t height, width, row, pixel;
};

// What follows a sum: a bias, a map of the result's layout to add, a ReLU. Null where not wanted.
template <class T>
struct Epilogue {
  const T *bias, *shortcut;
  bool relu;
};

// C (rows, columns) = A (rows, depth) B (depth, columns) at each of the points, or += where `add`.
template <class T>
struct PointProducts {
  int64_t rows, columns, depth;
  const T* A;
  int64_t a_row, a_step, a_point;
  const T* B;
  int64_t b_point;
  T* C;
  int64_t c_point;
  bool add = false;
};

}  // namespace

#define AUFAST_KERNELS "conv3x3.inc"
#include "foreach_isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPoints = 16;
constexpr int64_t kCached = 640 << 10;  // bytes of a block's points that stay in the second cache
constexpr int64_t kLeastTiles = 24;     // of a block, which reads its filters' points once
constexpr int64_t kSummedTiles =
    36;  // in one sum of the filters' gradient: long sums in parts are more exact
constexpr int64_t kManyNetworks = 8;
constexpr int64_t kOutputs = 16;  // whose filters are one item of work

struct Sizes {
  int64_t batch, networks, in, out, height, width;

  int64_t row() const { return (width + 1) / 2; }    // tiles of a row
  int64_t rows() const { return (height + 1) / 2; }  // rows of a map
};

// Elements from image to image and from network to network, and a map's own.
struct Layout {
  int64_t image, network;
  MapSize map;
};

// How the rows of tiles of a network are cut, and elements from point to point of pixels, results and
// filters.
template <class T>
struct Cut {
  int64_t total, blocks, x_step, y_step, w_step;

  explicit Cut(const Sizes& s, int64_t most_tiles = INT64_MAX) : total(s.batch * s.rows()) {
    const int64_t row = s.row() * (s.in + s.out) * kPoints * static_cast<int64_t>(sizeof(T));
    const int64_t cached = std::max(kCached / row, (kLeastTiles + s.row() - 1) / s.row());
    const int64_t rows = std::min(cached, std::max<int64_t>(1, most_tiles / s.row()));
    blocks = std::max<int64_t>(1, (total + rows - 1) / rows);
    const int64_t tiles = (total + blocks - 1) / blocks * s.row();
    // A cache line more, since points a power of two apart would share a few sets of a cache.
    x_step = tiles * s.in + kLine<T>, y_step = tiles * s.out + kLine<T>, w_step = s.in * s.out + kLine<T>;
  }
  int64_t begin(int64_t block) const { return block * total / blocks; }
};

// What one thread works with. Everything is written before it is read.
template <class T>
class Work {
 public:
  T *zeros, *nowhere, *x, *y, *weight;

  Work(KeptWorkspace& kept, const Sizes& s, const Cut<T>& cut, bool filters) {
    const int64_t widest = std::max(s.in, s.out);
    const int64_t size = 2 * widest + kPoints * (cut.x_step + cut.y_step + (filters ? cut.w_step : 0));
    zeros = workspace(kept, own_, size), nowhere = zeros + widest, x = nowhere + widest,
    y = x + kPoints * cut.x_step;
    weight = y + kPoints * cut.y_step;
    std::fill(zeros, zeros + 2 * widest, T(0));
  }

 private:
  std::vector<T> own_;
};

template <class T>
struct Maps {
  T* first;
  Layout layout;

  // The map of network n in image b.
  T* at(int64_t n, int64_t b) const { return first + b * layout.image + n * layout.network; }
};

template <class T>
struct Filters {
  const T* weight;  // (G; out, in, 3, 3), of the convolution that is computed or, turned, of its transpose
  bool turned;

  // Those of outputs [first, last) as points. Turned, the transpose's outputs are this one's inputs.
  void to_points(const Sizes& s, const Cut<T>& cut, int64_t n, int64_t first, int64_t last, T* points) const {
    const int64_t out = turned ? s.in : s.out, in = turned ? s.out : s.in;
    AUFAST_PICK(filters_to_points<T>)
    (weight + n * out * in * 9, out, in, first, std::min(last, out), turned, points, cut.w_step);
  }
  int64_t outputs(const Sizes& s) const { return turned ? s.in : s.out; }
};

// One block of rows of network n.
template <class T>
void convolve(const Maps<const T>& x, const T* filters, bool turned, const Epilogue<T>& then,
              const Maps<T>& out, const Sizes& s, const Cut<T>& cut, const Work<T>& work, int64_t n,
              int64_t block) {
  const int64_t first = cut.begin(block), last = cut.begin(block + 1), tiles = s.row();
  for (int64_t row = first; row < last; ++row) {
    AUFAST_PICK(pixels_to_points<T>)
    (x.at(n, row / s.rows()), x.layout.map, row % s.rows(), s.in, work.zeros,
     work.x + (row - first) * tiles * s.in, cut.x_step);
  }
  AUFAST_PICK(multiply_points<T>)
  ({(last - first) * tiles, s.out, s.in, work.x, s.in, 1, cut.x_step, filters, cut.w_step, work.y,
    cut.y_step},
   turned, work.zeros);
  for (int64_t row = first; row < last; ++row) {
    T* map = out.at(n, row / s.rows());
    const Epilogue<T> own{then.bias == nullptr ? nullptr : then.bias + n * s.out,
                          then.shortcut == nullptr ? nullptr : then.shortcut + (map - out.first), then.relu};
    AUFAST_PICK(points_to_results<T>)
    (work.y + (row - first) * tiles * s.out, cut.y_step, out.layout.map, row % s.rows(), s.out, own,
     work.nowhere, map);
  }
}

// Results and filters' points are megabytes of fresh memory.
Tensor fresh(const Tensor& like, std::initializer_list<int64_t> sizes) {
  Tensor result = torch::stable::new_empty(like, sizes);
  prefer_huge_pages(result);
  return result;
}

template <class T>
void forward(const Maps<const T>& x, const Filters<T>& filters, const Epilogue<T>& then, const Maps<T>& out,
             const Sizes& s, const Tensor& like) {
  const Cut<T> cut(s);
  if (s.networks >= kManyNetworks) {
    return torch::stable::parallel_for(0, s.networks, 1, [&](int64_t begin, int64_t end) {
      thread_local KeptWorkspace kept;
      const Work<T> work(kept, s, cut, true);
      for (int64_t n = begin; n < end; ++n) {
        filters.to_points(s, cut, n, 0, filters.outputs(s), work.weight);
        for (int64_t block = 0; block < cut.blocks; ++block)
          convolve<T>(x, work.weight, filters.turned, then, out, s, cut, work, n, block);
      }
    });
  }
  const int64_t size = kPoints * cut.w_step, pieces = (filters.outputs(s) + kOutputs - 1) / kOutputs;
  const Tensor memory = fresh(like, {s.networks * size});
  T* points = data<T>(memory);
  torch::stable::parallel_for(0, s.networks * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / pieces, first = item % pieces * kOutputs;
      filters.to_points(s, cut, n, first, first + kOutputs, points + n * size);
    }
  });
  torch::stable::parallel_for(0, s.networks * cut.blocks, 1, [&](int64_t begin, int64_t end) {
    thread_local KeptWorkspace kept;
    const Work<T> work(kept, s, cut, false);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / cut.blocks;
      convolve<T>(x, points + n * size, filters.turned, then, out, s, cut, work, n, item % cut.blocks);
    }
  });
}

// dW of every network; x and grad go through points a block of rows at a time, and products are summed over
// the blocks in their order.
template <class T>
void filter_gradient(const Maps<const T>& grad, const Maps<const T>& x, T* d_weight, const Sizes& s) {
  const Cut<T> cut(s, kSummedTiles);
  torch::stable::parallel_for(0, s.networks, 1, [&](int64_t begin, int64_t end) {
    thread_local KeptWorkspace kept;
    const Work<T> work(kept, s, cut, true);
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t block = 0; block < cut.blocks; ++block) {
        const int64_t first = cut.begin(block), last = cut.begin(block + 1);
        for (int64_t row = first; row < last; ++row) {
          const int64_t b = row / s.rows(), y = row % s.rows(), tile = (row - first) * s.row();
          AUFAST_PICK(results_to_points<T>)
          (grad.at(n, b), grad.layout.map, y, s.out, work.zeros, work.y + tile * s.out, cut.y_step);
          AUFAST_PICK(pixels_to_points<T>)
          (x.at(n, b), x.layout.map, y, s.in, work.zeros, work.x + tile * s.in, cut.x_step);
        }
        AUFAST_PICK(multiply_points<T>)
        ({s.out, s.in, (last - first) * s.row(), work.y, 1, s.out, cut.y_step, work.x, cut.x_step,
          work.weight, cut.w_step, block != 0},
         false, work.zeros);
      }
      AUFAST_PICK(points_to_filters<T>)
      (work.weight, cut.w_step, s.out, s.in, d_weight + n * s.out * s.in * 9);
    }
  });
}

// x (B, G, h, w, C_in) and results (B, h, w, G, C_out), channels side by side.
Sizes sizes_of(const Tensor& x, int64_t networks, int64_t in, int64_t out) {
  STD_TORCH_CHECK(x.dim() == 5 && x.size(1) == networks && x.size(4) == in, "conv3x3: wrong shapes");
  STD_TORCH_CHECK(in % kOutputs == 0 && out % kOutputs == 0, "conv3x3: channels must be multiples of 16");
  STD_TORCH_CHECK(x.stride(4) == 1 || x.numel() == 0, "conv3x3: channels must lie side by side");
  return {x.size(0), networks, in, out, x.size(2), x.size(3)};
}

Layout layout_of(const Tensor& x) {
  return {x.stride(0), x.stride(1), {x.size(2), x.size(3), x.stride(2), x.stride(3)}};
}
Layout result_layout(const Sizes& s) {
  const int64_t pixel = s.networks * s.out;
  return {s.height * s.width * pixel, s.out, {s.height, s.width, s.width * pixel, pixel}};
}

template <class Body>
void dispatch(ScalarType type, const Body& body) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "conv3x3: x must be float32 or float64");
  type == ScalarType::Float ? body(float()) : body(double());
}

Tensor conv3x3(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> shortcut, bool relu,
               bool turned) {
  STD_TORCH_CHECK(weight.dim() == 5, "conv3x3: wrong shapes");
  const Sizes s = sizes_of(x, weight.size(0), weight.size(turned ? 1 : 2), weight.size(turned ? 2 : 1));
  weight = dense_of(weight);
  bias = dense_of(bias);
  shortcut = dense_of(shortcut);
  Tensor out = fresh(x, {s.batch, s.height, s.width, s.networks, s.out});
  if (out.numel() == 0) return out;
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    forward<T>({data<T>(x), layout_of(x)}, {data<T>(weight), turned},
               {data<T>(bias), data<T>(shortcut), relu}, {data<T>(out), result_layout(s)}, s, x);
  });
  return out;
}

Tensor conv3x3_filters(Tensor grad, Tensor x) {
  STD_TORCH_CHECK(grad.dim() == 5, "conv3x3_filters: wrong shapes");
  const Sizes s = sizes_of(x, grad.size(3), x.size(4), grad.size(4));
  grad = dense_of(grad);
  Tensor d_weight = fresh(x, {s.networks, s.out, s.in, 3, 3});
  if (x.numel() == 0) return torch::stable::zero_(d_weight);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    filter_gradient<T>({data<T>(grad), result_layout(s)}, {data<T>(x), layout_of(x)}, data<T>(d_weight), s);
  });
  return d_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aufast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_filters", TORCH_BOX(&conv3x3_filters));
}
