// Region convolution on the CPU: every patch of an n×n grid has its own 3×3 filters, and the ReLU(x·scale +
// shift) in front of them is applied while the patch is loaded.
//
// Forward: a work item is one patch of one image; consecutive items share the packed filters of their patch.
// Backward: a work item is one patch of some images, summed in their order; items of the same patch are added
// in theirs, so that no sum depends on the number of threads. docs/operators/region_conv.md derives the
// backward.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "dense.h"
#include "image.h"
#include "isa.h"
#include "region_geometry.h"

namespace {

// The functions of a level that make up the forward pass, on cells of `channels` input channels each.
template <class T>
struct ForwardKernels {
  using A = accumulator<T>;
  int64_t channels;
  void (*load)(const T*, const View&, int64_t, const Grid&, const T*, const T*, A*);
  void (*pack)(const T*, int64_t, int64_t, A*);
  void (*convolve)(const A*, const Grid&, int64_t, const A*, const A*, A*, Ahead&, Ahead&);
  void (*store)(const A*, const View&, int64_t, const Grid&, T*);
};

}  // namespace

#define AUFAST_KERNELS "region_conv.inc"
#include "foreach_isa.h"
#include "region_points.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSlack = 16;        // elements behind a result: a row's last vector is read whole
constexpr int64_t kEnoughItems = 16;  // below, the backward also splits the images of a patch
constexpr int kWantX = 1, kWantWeight = 2, kWantBias = 4, kWantScale = 8, kWantShift = 16;

View view_of(const Grid& g, int64_t channels) {
  if (g.channels_last) return {1, g.width * channels, channels};
  return {g.height * g.width, g.width, 1};
}

// Where patch `index` of image b begins.
int64_t origin(const Grid& g, const View& view, int64_t channels, int64_t b, int64_t index) {
  const int64_t y = index / g.patches * g.rows, x = index % g.patches * g.columns;
  return b * channels * g.height * g.width + y * view.row + x * view.pixel;
}

// The arguments of a call; absent ones are null.
template <class T>
struct Operands {
  const T *x, *weight, *bias, *scale, *shift;
};

template <class T>
accumulator<T> widen(T value) {
  return AUFAST_PICK(element<T>)(&value);
}

template <class T>
void forward(const Operands<T>& a, T* out, const Grid& g) {
  using A = accumulator<T>;
  const View from = view_of(g, g.in), to = view_of(g, g.out);
  const ForwardKernels<T> run = AUFAST_PICK(forward_kernels<T>)();
  const int64_t block = AUFAST_PICK(filters_per_block)(), depth = (g.in + run.channels - 1) / run.channels;
  const int64_t plane = AUFAST_PICK(plane_size<T>)(g), flat = AUFAST_PICK(result_size<T>)(g);
  const int64_t blocks = (g.out + block - 1) / block, shares = AUFAST_PICK(position_blocks<T>)(g);
  torch::stable::parallel_for(0, g.patches * g.patches * g.batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> planes(depth * plane), packed(blocks * block * depth * 9), result(block * flat + kSlack),
        bias(block);
    int64_t packed_for = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t index = item / g.batch, b = item % g.batch;
      if (index != packed_for) run.pack(a.weight + index * g.out * g.in * 9, g.out, g.in, packed.data());
      packed_for = index;
      run.load(a.x + origin(g, from, g.in, b, index), from, g.in, g,
               a.scale ? a.scale + index * g.in : nullptr, a.shift ? a.shift + index * g.in : nullptr,
               planes.data());
      Ahead next;
      if (item + 1 < end) {
        const T* patch = a.x + origin(g, from, g.in, (item + 1) % g.batch, (item + 1) / g.batch);
        next = ahead(patch, from, g, g.in, blocks * shares);
      }
      for (int64_t first = 0; first < g.out; first += block) {
        const int64_t filters = std::min(block, g.out - first);
        T* place = out + origin(g, to, g.out, b, index) + first * to.channel;
        Ahead own = ahead(place, to, g, filters, shares);
        for (int64_t f = 0; a.bias && f < filters; ++f) bias[f] = widen(a.bias[index * g.out + first + f]);
        run.convolve(planes.data(), g, depth, packed.data() + first * depth * 9, bias.data(), result.data(),
                     next, own);
        run.store(result.data(), to, filters, g, place);
      }
    }
  });
}

// With few channels, filters or tiles the transformations cost more than the products they save. Of the shape
// alone and not of the batch, so that an image has the same bits in any.
bool pays_in_points(const Grid& g) {
  const int64_t tiles = (g.rows + 1) / 2 * ((g.columns + 1) / 2);
  return g.in >= 8 && g.out >= 8 && g.in * g.out >= 128 && tiles >= 64;
}

template <class T>
void forward_by_points(const Operands<T>& a, T* out, const Grid& g) {
  const View from = view_of(g, g.in), to = view_of(g, g.out);
  torch::stable::parallel_for(0, g.patches * g.patches * g.batch, 1, [&](int64_t begin, int64_t end) {
    thread_local KeptWorkspace kept;
    PointWork<T> work(g, kept);
    int64_t filters_of = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t index = item / g.batch, b = item % g.batch;
      if (index != filters_of)
        work.take_filters(a.weight + index * g.out * g.in * 9, a.bias ? a.bias + index * g.out : nullptr);
      filters_of = index;
      Ahead next;
      if (item + 1 < end) {
        const T* patch = a.x + origin(g, from, g.in, (item + 1) % g.batch, (item + 1) / g.batch);
        next = ahead(patch, from, g, g.in, work.shares());
      }
      work.run(a.x + origin(g, from, g.in, b, index), from, a.scale ? a.scale + index * g.in : nullptr,
               a.shift ? a.shift + index * g.in : nullptr, to, out + origin(g, to, g.out, b, index), next);
    }
  });
}

// Where the gradients go; unwanted ones are null.
template <class T>
struct Gradients {
  T *x, *weight, *bias, *scale, *shift;
};

// What one item sums for the gradients of a patch's parameters: weight, bias, scale and shift, one after the
// other.
struct Sums {
  double *weight, *bias, *scale, *shift;

  static int64_t size(const Grid& g) { return g.out * g.in * 9 + g.out + 2 * g.in; }
  Sums(double* begin, const Grid& g)
      : weight(begin), bias(weight + g.out * g.in * 9), scale(bias + g.out), shift(scale + g.in) {}
};

// Some images of one patch.
template <class T>
class BackwardItem {
 public:
  using A = accumulator<T>;

  explicit BackwardItem(const Grid& g)
      : g_(g),
        block_(AUFAST_PICK(filters_per_block)()),
        plane_(AUFAST_PICK(plane_size<T>)(g)),
        planes_(g.in * plane_),
        grad_buffer_(g.out * plane_ + 2 * kLine<A>),
        grad_(on_lines(grad_buffer_.data(), AUFAST_PICK(first_pixel)(g))),
        result_(block_ * AUFAST_PICK(result_size<T>)(g) + kSlack),
        zero_bias_(block_),
        filter_sum_(AUFAST_PICK(filter_sum_size<T>)(g.out, g.in)),
        packed_((g.in + block_ - 1) / block_ * block_ * g.out * 9) {}

  // Images [begin, end); `sums` are zero before.
  void run(const T* grad, const Operands<T>& a, const Gradients<T>& to, int64_t index, int64_t begin,
           int64_t end, const Sums& sums) {
    const View from = view_of(g_, g_.in), out = view_of(g_, g_.out);
    const T* weight = a.weight + index * g_.out * g_.in * 9;
    const T* scale = a.scale ? a.scale + index * g_.in : nullptr;
    const T* shift = a.shift ? a.shift + index * g_.in : nullptr;
    const bool through_filters = to.x || to.scale || to.shift;
    if (through_filters) AUFAST_PICK(pack_filters<T>)(weight, g_.out, g_.in, true, packed_.data());
    std::fill(filter_sum_.begin(), filter_sum_.end(), A(0));
    for (int64_t b = begin; b < end; ++b) {
      const int64_t patch = origin(g_, from, g_.in, b, index);
      AUFAST_PICK(load_patch<T>)
      (grad + origin(g_, out, g_.out, b, index), out, g_.out, g_, nullptr, nullptr, grad_);
      AUFAST_PICK(load_patch<T>)(a.x + patch, from, g_.in, g_, scale, shift, planes_.data());
      if (to.weight) add_filters();
      if (to.bias) AUFAST_PICK(add_bias_gradient<T>)(grad_, g_, g_.out, sums.bias);
      if (through_filters) add_inputs(a.x + patch, from, scale, sums.scale, to.x ? to.x + patch : nullptr);
    }
    if (to.weight) AUFAST_PICK(finish_filter_gradient<T>)(filter_sum_.data(), g_.out, g_.in, sums.weight);
  }

 private:
  void add_filters() {
    for (int64_t first = 0; first < g_.out; first += block_) {
      AUFAST_PICK(add_filter_gradient<T>)
      (grad_ + first * plane_, planes_.data(), g_, g_.in, std::min(block_, g_.out - first),
       filter_sum_.data() + AUFAST_PICK(filter_sum_size<T>)(first, g_.in));
    }
  }

  void add_inputs(const T* x, const View& view, const T* scale, double* sums, T* to) {
    Ahead none;
    for (int64_t first = 0; first < g_.in; first += block_) {
      AUFAST_PICK(convolve<T>)
      (grad_, g_, g_.out, packed_.data() + first * g_.out * 9, zero_bias_.data(), result_.data(), none, none);
      AUFAST_PICK(finish_patch<T>)
      (result_.data(), planes_.data() + first * plane_, x + first * view.channel, view, g_,
       std::min(block_, g_.in - first), scale ? scale + first : nullptr, g_.in, sums + first,
       to ? to + first * view.channel : nullptr);
    }
  }

  const Grid& g_;
  int64_t block_, plane_;
  std::vector<A> planes_, grad_buffer_;
  A* grad_;
  std::vector<A> result_, zero_bias_, filter_sum_, packed_;
};

// Adds the sums of a patch's items in their order: `count` numbers, `stride` from item to item.
template <class T>
void add_items(const double* sums, int64_t items, int64_t stride, int64_t count, T* to) {
  for (int64_t i = 0; to && i < count; ++i) {
    double total = sums[i];
    for (int64_t k = 1; k < items; ++k) total += sums[k * stride + i];
    AUFAST_PICK(put<T>)(to + i, static_cast<accumulator<T>>(total));
  }
}

template <class T>
void backward(const T* grad, const Operands<T>& a, const Gradients<T>& to, const Grid& g) {
  const int64_t patches = g.patches * g.patches, size = Sums::size(g),
                groups = std::clamp<int64_t>(kEnoughItems / patches, 1, std::max<int64_t>(g.batch, 1));
  std::vector<double> sums(patches * groups * size);
  torch::stable::parallel_for(0, patches * groups, 1, [&](int64_t begin, int64_t end) {
    BackwardItem<T> work(g);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item % groups;
      work.run(grad, a, to, item / groups, group * g.batch / groups, (group + 1) * g.batch / groups,
               Sums(sums.data() + item * size, g));
    }
  });
  torch::stable::parallel_for(0, patches, 4, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Sums first(sums.data() + index * groups * size, g);
      const auto add = [&](const double* from, T* gradient, int64_t count) {
        add_items(from, groups, size, count, gradient ? gradient + index * count : nullptr);
      };
      add(first.weight, to.weight, g.out * g.in * 9);
      add(first.bias, to.bias, g.out);
      add(first.scale, to.scale, g.in);
      add(first.shift, to.shift, g.in);
    }
  });
}

Grid grid_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 6 && weight.size(3) == x.size(1),
                  "region_conv: wrong shapes");
  const int64_t n = weight.size(0);
  STD_TORCH_CHECK(n > 0 && weight.size(1) == n && x.size(2) % n == 0 && x.size(3) % n == 0,
                  "region_conv: wrong grid");
  return {x.size(0), x.size(1),     weight.size(2), x.size(2),          x.size(3),
          n,         x.size(2) / n, x.size(3) / n,  is_channels_last(x)};
}

// A map in the wanted memory order: itself, or a copy.
Tensor in_order(const Tensor& map, bool channels_last) {
  if (!channels_last) return dense_of(map);
  Tensor last = torch::stable::transpose(torch::stable::transpose(map, 1, 2), 2, 3);  // (B, H, W, C)
  last = dense_of(last);
  return torch::stable::transpose(torch::stable::transpose(last, 2, 3), 1, 2);  // (B, C, H, W)
}

Tensor new_map(const Tensor& like, const Grid& g, int64_t channels) {
  if (!g.channels_last) return torch::stable::new_empty(like, {g.batch, channels, g.height, g.width});
  const Tensor last = torch::stable::new_empty(like, {g.batch, g.height, g.width, channels});
  return torch::stable::transpose(torch::stable::transpose(last, 2, 3), 1, 2);
}

std::optional<Tensor> converted(const std::optional<Tensor>& tensor, ScalarType type) {
  if (!tensor) return std::nullopt;
  return torch::stable::to(*tensor, type);
}

template <class Body>
void dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float());
    case ScalarType::Double:
      return body(double());
    case ScalarType::BFloat16:
      return body(uint16_t());
    default:
      STD_TORCH_CHECK(false, "region_conv: x must be float32, float64, bfloat16 or float16");
  }
}

using Maybe = std::optional<Tensor>;

Tensor region_conv(Tensor x, Tensor weight, Maybe bias, Maybe scale, Maybe shift) {
  if (x.scalar_type() == ScalarType::Half) {
    const auto wide = ScalarType::Float;
    return torch::stable::to(
        region_conv(torch::stable::to(x, wide), torch::stable::to(weight, wide), converted(bias, wide),
                    converted(scale, wide), converted(shift, wide)),
        ScalarType::Half);
  }
  const Grid g = grid_of(x, weight);
  x = in_order(x, g.channels_last);
  weight = dense_of(weight);
  bias = dense_of(bias);
  scale = dense_of(scale);
  shift = dense_of(shift);
  Tensor out = new_map(x, g, g.out);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Operands<T> a{data<T>(x), data<T>(weight), data<T>(bias), data<T>(scale), data<T>(shift)};
    if constexpr (sizeof(T) != 2) {
      if (pays_in_points(g)) return forward_by_points<T>(a, data<T>(out), g);
    }
    forward<T>(a, data<T>(out), g);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> region_conv_backward(Tensor grad, Tensor x, Tensor weight,
                                                                        Maybe bias, Maybe scale, Maybe shift,
                                                                        int64_t needs) {
  if (x.scalar_type() == ScalarType::Half) {
    const auto wide = ScalarType::Float;
    const auto half = [](const Tensor& t) { return torch::stable::to(t, ScalarType::Half); };
    auto [d_x, d_weight, d_bias, d_scale, d_shift] = region_conv_backward(
        torch::stable::to(grad, wide), torch::stable::to(x, wide), torch::stable::to(weight, wide),
        converted(bias, wide), converted(scale, wide), converted(shift, wide), needs);
    return {half(d_x), half(d_weight), half(d_bias), half(d_scale), half(d_shift)};
  }
  const Grid g = grid_of(x, weight);
  grad = in_order(grad, g.channels_last);
  x = in_order(x, g.channels_last);
  weight = dense_of(weight);
  scale = dense_of(scale);
  shift = dense_of(shift);
  const Maybe parameters[] = {weight, bias, scale, shift};
  Tensor results[] = {needs & kWantX ? new_map(x, g, g.in) : torch::stable::new_empty(x, {0}), x, x, x, x};
  bool wanted[5] = {(needs & kWantX) != 0};
  for (int k = 1; k < 5; ++k) {
    wanted[k] = parameters[k - 1] && (needs >> k & 1);
    results[k] = wanted[k] ? torch::stable::new_empty(x, parameters[k - 1]->sizes())
                           : torch::stable::new_empty(x, {0});
  }
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto to = [&](int k) { return wanted[k] ? data<T>(results[k]) : nullptr; };
    const Operands<T> a{data<T>(x), data<T>(weight), nullptr, data<T>(scale), data<T>(shift)};
    const Gradients<T> gradients{to(0), to(1), to(2), to(3), to(4)};
    backward(data<T>(grad), a, gradients, g);
  });
  return {results[0], results[1], results[2], results[3], results[4]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aufast, CPU, m) {
  m.impl("region_conv", TORCH_BOX(&region_conv));
  m.impl("region_conv_backward", TORCH_BOX(&region_conv_backward));
}
