// Grouped 3×3 convolutions of small maps on the CPU, stride 1 and zero padding 1, by Winograd's minimal
// filtering F(2×2, 3×3): 16 products give 4 results, where the sum over taps takes 36.
//
// A work item is one network: its filters become points once, then some images at a time, as many as stay in
// the second cache, go through points, products and results. So every sum has one order, whoever takes the
// item.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "dense.h"
#include "isa.h"
#include "pages.h"

namespace {

// A map's height and width, and elements from row to row and from pixel to pixel.
struct MapSize {
  int64_t height, width, row, pixel;
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

#define AUFAST_KERNELS "roi_conv.inc"
#include "foreach_isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPoints = 16;
constexpr int64_t kCached =
    640 << 10;  // bytes of points, of pixels and results, that stay in the second cache
constexpr int kWantX = 1, kWantWeight = 2;

// Elements from image to image and from network to network, and a map's own.
struct Layout {
  int64_t image, network;
  MapSize map;
};

struct Sizes {
  int64_t batch, networks, in, out, height, width, tiles;  // tiles of one map
};

template <class T>
struct Cut {
  int64_t blocks, tiles;           // blocks of images, and tiles of the largest
  int64_t x_step, y_step, w_step;  // from point to point of pixels, results and filters

  explicit Cut(const Sizes& s) {
    const int64_t image = s.tiles * (s.in + s.out) * kPoints * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::max<int64_t>(1, kCached / image);
    blocks = std::max<int64_t>(1, (s.batch + most - 1) / most);
    tiles = (s.batch + blocks - 1) / blocks * s.tiles;
    // A cache line more, since points a power of two apart would share a few sets of a cache.
    constexpr int64_t line = 64 / sizeof(T);
    x_step = tiles * s.in + line, y_step = tiles * s.out + line, w_step = s.in * s.out + line;
  }
};

// What one thread works with. Everything is written before it is read.
template <class T>
struct Work {
  T *zeros, *nowhere, *x, *y, *weight, *d_weight;

  Work(KeptWorkspace& kept, std::vector<T>& own, const Sizes& s, const Cut<T>& cut, bool backward) {
    const int64_t widest = std::max(s.in, s.out);
    const int64_t size = 2 * widest + kPoints * (cut.x_step + cut.y_step + (backward ? 2 : 1) * cut.w_step);
    T* memory = static_cast<T*>(kept.get(size * sizeof(T)));
    if (memory == nullptr) {
      own.assign(size, std::numeric_limits<T>::quiet_NaN());
      memory = own.data();
    }
    zeros = memory, nowhere = zeros + widest, x = nowhere + widest, y = x + kPoints * cut.x_step;
    weight = y + kPoints * cut.y_step, d_weight = weight + kPoints * cut.w_step;
    std::fill(zeros, zeros + 2 * widest, T(0));
  }
};

template <class T>
void forward(const T* x, const Layout& from, const T* weight, const T* bias, bool relu, T* out,
             const Layout& to, const Sizes& s) {
  const Cut<T> cut(s);
  torch::stable::parallel_for(0, s.networks, 1, [&](int64_t begin, int64_t end) {
    thread_local KeptWorkspace kept;
    std::vector<T> own;
    const Work<T> work(kept, own, s, cut, false);
    for (int64_t n = begin; n < end; ++n) {
      AUFAST_PICK(filters_to_points<T>)
      (weight + n * s.out * 9 * s.in, s.out, s.in, true, work.weight, cut.w_step);
      for (int64_t block = 0; block < cut.blocks; ++block) {
        const int64_t first = block * s.batch / cut.blocks, last = (block + 1) * s.batch / cut.blocks;
        for (int64_t b = first; b < last; ++b) {
          AUFAST_PICK(pixels_to_points<T>)
          (x + b * from.image + n * from.network, from.map, s.in, work.zeros,
           work.x + (b - first) * s.tiles * s.in, cut.x_step);
        }
        AUFAST_PICK(multiply_points<T>)
        ({(last - first) * s.tiles, s.out, s.in, work.x, s.in, 1, cut.x_step, work.weight, cut.w_step, work.y,
          cut.y_step},
         work.zeros);
        for (int64_t b = first; b < last; ++b) {
          AUFAST_PICK(points_to_results<T>)
          (work.y + (b - first) * s.tiles * s.out, cut.y_step, to.map, s.out,
           bias == nullptr ? nullptr : bias + n * s.out, relu, work.nowhere,
           out + b * to.image + n * to.network);
        }
      }
    }
  });
}

template <class T>
void backward(const T* grad, const Layout& to, const T* x, const Layout& from, const T* weight, T* d_x,
              const Layout& back, T* d_weight, const Sizes& s) {
  const Cut<T> cut(s);
  torch::stable::parallel_for(0, s.networks, 1, [&](int64_t begin, int64_t end) {
    thread_local KeptWorkspace kept;
    std::vector<T> own;
    const Work<T> work(kept, own, s, cut, true);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t filters = n * s.out * 9 * s.in;
      if (d_x != nullptr) {
        AUFAST_PICK(filters_to_points<T>)(weight + filters, s.out, s.in, false, work.weight, cut.w_step);
      }
      for (int64_t block = 0; block < cut.blocks; ++block) {
        const int64_t first = block * s.batch / cut.blocks, last = (block + 1) * s.batch / cut.blocks;
        const int64_t tiles = (last - first) * s.tiles;
        for (int64_t b = first; b < last; ++b) {
          const int64_t tile = (b - first) * s.tiles;
          AUFAST_PICK(results_to_points<T>)
          (grad + b * to.image + n * to.network, to.map, s.out, work.zeros, work.y + tile * s.out,
           cut.y_step);
          if (d_weight != nullptr) {
            AUFAST_PICK(pixels_to_points<T>)
            (x + b * from.image + n * from.network, from.map, s.in, work.zeros, work.x + tile * s.in,
             cut.x_step);
          }
        }
        if (d_weight != nullptr) {
          AUFAST_PICK(multiply_points<T>)
          ({s.out, s.in, tiles, work.y, 1, s.out, cut.y_step, work.x, cut.x_step, work.d_weight, cut.w_step,
            block != 0},
           work.zeros);
        }
        if (d_x == nullptr) continue;
        AUFAST_PICK(multiply_points<T>)
        ({tiles, s.in, s.out, work.y, s.out, 1, cut.y_step, work.weight, cut.w_step, work.x, cut.x_step},
         work.zeros);
        for (int64_t b = first; b < last; ++b) {
          AUFAST_PICK(points_to_pixels<T>)
          (work.x + (b - first) * s.tiles * s.in, cut.x_step, back.map, s.in, work.nowhere,
           d_x + b * back.image + n * back.network);
        }
      }
      if (d_weight != nullptr) {
        AUFAST_PICK(points_to_filters<T>)(work.d_weight, cut.w_step, s.out, s.in, d_weight + filters);
      }
    }
  });
}

// x (B, G, h, w, C_in), weight (G, C_out, C_in, 3, 3).
Sizes sizes_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 5 && weight.dim() == 5 && weight.size(0) == x.size(1) &&
                      weight.size(2) == x.size(4) && weight.size(3) == 3 && weight.size(4) == 3,
                  "roi_conv: wrong shapes");
  const int64_t height = x.size(2), width = x.size(3), tiles = (height + 1) / 2 * ((width + 1) / 2);
  const Sizes s{x.size(0), x.size(1), x.size(4), weight.size(1), height, width, tiles};
  STD_TORCH_CHECK(s.in % 16 == 0 && s.out % 16 == 0, "roi_conv: channels must be multiples of 16");
  STD_TORCH_CHECK(x.stride(4) == 1 || x.numel() == 0, "roi_conv: channels must lie side by side");
  return s;
}

Layout layout_of(const Tensor& x) {
  return {x.stride(0), x.stride(1), {x.size(2), x.size(3), x.stride(2), x.stride(3)}};
}
// Of a dense map (B, h, w, G, C).
Layout result_layout(const Sizes& s) {
  const int64_t pixel = s.networks * s.out;
  return {s.height * s.width * pixel, s.out, {s.height, s.width, s.width * pixel, pixel}};
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class Body>
void dispatch(ScalarType type, const Body& body) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "roi_conv: x must be float32 or float64");
  type == ScalarType::Float ? body(float()) : body(double());
}

Tensor roi_conv(Tensor x, Tensor weight, std::optional<Tensor> bias, bool relu) {
  const Sizes s = sizes_of(x, weight);
  weight = dense_of(weight);
  if (bias) bias = dense_of(*bias);
  Tensor out = torch::stable::new_empty(x, {s.batch, s.height, s.width, s.networks, s.out});
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    forward<T>(data<T>(x), layout_of(x), data<T>(weight), bias ? data<T>(*bias) : nullptr, relu, data<T>(out),
               result_layout(s), s);
  });
  return out;
}

std::tuple<Tensor, Tensor> roi_conv_backward(Tensor grad, Tensor x, Tensor weight, int64_t needs) {
  const Sizes s = sizes_of(x, weight);
  grad = dense_of(grad);
  weight = dense_of(weight);
  const auto result = [&](int want, const Tensor& like) {
    return needs & want ? torch::stable::empty_like(like) : torch::stable::new_empty(like, {0});
  };
  Tensor d_x = result(kWantX, x), d_weight = result(kWantWeight, weight);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    backward<T>(data<T>(grad), result_layout(s), data<T>(x), layout_of(x), data<T>(weight),
                needs & kWantX ? data<T>(d_x) : nullptr, needs & kWantX ? layout_of(d_x) : Layout{},
                needs & kWantWeight ? data<T>(d_weight) : nullptr, s);
  });
  return {d_x, d_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aufast, CPU, m) {
  m.impl("roi_conv", TORCH_BOX(&roi_conv));
  m.impl("roi_conv_backward", TORCH_BOX(&roi_conv_backward));
}
