// The forward pass of region_conv by Winograd's minimal filtering, one patch of one image after the other.
// Read after the kernels; region_points.inc says what the buffers hold.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "pages.h"
#include "region_geometry.h"

namespace {

// One block of rows of tiles at a time goes through points, products and results.
template <class T>
class PointWork {
 public:
  PointWork(const Grid& g, KeptWorkspace& kept)
      : g_(g),
        lanes_(AUFAST_PICK(lane_count<T>)()),
        block_(AUFAST_PICK(filters_per_block)()),
        blocks_((g.out + block_ - 1) / block_),
        run_(AUFAST_PICK(vectors_per_run)()),
        cut_(g, sizeof(T), lanes_, block_, run_) {
    const int64_t out = blocks_ * block_, tiles = cut_.vectors * lanes_;
    const std::pair<T**, int64_t> buffers[] = {{&pixels_, 16 * cut_.pixels},
                                               {&points_, 16 * cut_.results},
                                               {&filters_, 16 * cut_.filters},
                                               {&quarters_, lanes_ * 4 * cut_.quarter},
                                               {&results_, block_ * 2 * cut_.half},
                                               {&line_, lanes_ * cut_.line},
                                               {&before_, tiles},
                                               {&behind_, tiles},
                                               {&packed_, out * g.in * 9 + lanes_},
                                               {&bias_, out},
                                               {&zeros_, out}};
    const auto in_lines = [](int64_t count) { return (count + kLine<T> - 1) / kLine<T> * kLine<T>; };
    int64_t size = kLine<T>;
    for (const auto& [buffer, count] : buffers) size += in_lines(count);
    T* memory = on_lines(workspace(kept, own_, size));
    for (const auto& [buffer, count] : buffers) *buffer = memory, memory += in_lines(count);
    std::fill(bias_, bias_ + out, T(0));
    std::fill(zeros_, zeros_ + out, T(0));
    AUFAST_PICK(row_ends<T>)(cut_, before_, behind_);
  }

  // How often something is fetched in a block, and in all.
  int64_t block_shares() const { return 16 * blocks_ * cut_.runs; }
  int64_t shares() const { return cut_.blocks * block_shares(); }

  void take_filters(const T* weight, const T* bias) {
    AUFAST_PICK(pack_filters<T>)(weight, g_.out, g_.in, false, packed_);
    AUFAST_PICK(filters_to_points<T>)(packed_, blocks_ * g_.in, filters_, cut_.filters);
    if (bias) std::copy(bias, bias + g_.out, bias_);
  }

  // One image's patch.
  void run(const T* x, const View& from, const T* scale, const T* shift, const View& to, T* out,
           Ahead& next) {
    for (int64_t block = 0; block < cut_.blocks; ++block) {
      const int64_t first = block * cut_.block_rows, rows = std::min(cut_.block_rows, cut_.rows - first);
      take_pixels(x, from, scale, shift, first, rows);
      T* place = out + 2 * first * to.row;
      Grid part = g_;
      part.rows = std::min(2 * rows, g_.rows - 2 * first);
      Ahead own = ahead(place, to, part, g_.out, block_shares());
      AUFAST_PICK(multiply_points<T>)
      (pixels_, filters_, bias_, zeros_, cut_, g_.in, blocks_, points_, next, own);
      give_results(to, part.rows, place);
    }
  }

 private:
  void take_pixels(const T* x, const View& view, const T* scale, const T* shift, int64_t first,
                   int64_t rows) {
    const int64_t above = 2 * first - 1, start = std::max<int64_t>(0, above),
                  end = std::min(g_.rows, above + 2 * rows + 2),
                  group = std::min<int64_t>(lanes_, view.pixel == 1 ? 4 : lanes_);
    for (int64_t c = 0; c < g_.in; c += group) {
      const int64_t channels = std::min(group, g_.in - c);
      for (int64_t k = 0; above < 0 && k < channels; ++k)
        AUFAST_PICK(zero_row<T>)(cut_, 0, quarters_ + 4 * k * cut_.quarter);
      AUFAST_PICK(split_rows<T>)
      (x + c * view.channel + start * view.row, view, channels, start - above, end - start, g_.columns,
       scale ? scale + c : nullptr, shift ? shift + c : nullptr, cut_, line_, quarters_);
      for (int64_t k = 0; k < channels; ++k) {
        T* quarters = quarters_ + 4 * k * cut_.quarter;
        for (int64_t y = end - above; y < 2 * rows + 2; ++y) AUFAST_PICK(zero_row<T>)(cut_, y, quarters);
        AUFAST_PICK(pixels_to_points<T>)
        (quarters, cut_, before_, behind_, pixels_ + (c + k) * run_ * lanes_);
      }
    }
  }

  void give_results(const View& to, int64_t rows, T* out) {
    const View other{to.channel, 2 * to.row, to.pixel};
    for (int64_t first = 0; first < g_.out; first += block_) {
      const int64_t filters = std::min(block_, g_.out - first);
      for (int64_t f = 0; f < filters; ++f) {
        AUFAST_PICK(points_to_results<T>)
        (points_ + (first + f) * cut_.vectors * lanes_, cut_, results_ + f * 2 * cut_.half);
      }
      for (int64_t odd = 0; odd < 2; ++odd) {
        AUFAST_PICK(store_rows<T>)
        (results_ + odd * cut_.half, 2 * cut_.columns, 2 * cut_.half, other, filters, (rows + 1 - odd) / 2,
         g_.columns, out + odd * to.row + first * to.channel);
      }
    }
  }

  const Grid& g_;
  int64_t lanes_, block_, blocks_, run_;
  TileCut cut_;
  std::vector<T> own_;
  T *pixels_, *points_, *filters_, *quarters_, *results_, *line_, *before_, *behind_, *packed_, *bias_,
      *zeros_;
};

}  // namespace
