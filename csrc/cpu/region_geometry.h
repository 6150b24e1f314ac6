// How region_conv lays out and cuts its work.
#pragma once

#include <algorithm>
#include <cstdint>

namespace {

struct Grid {
  int64_t batch, in, out, height, width, patches, rows, columns;  // n×n patches of rows×columns pixels
  bool channels_last;
};

// Elements from channel to channel, row to row and pixel to pixel of a map.
struct View {
  int64_t channel, row, pixel;
};

// The rows of a patch that is wanted soon, to be read or to be written: fetched into the second cache while
// another is convolved, since from memory they would be waited for. Sizes in bytes; none of it by default.
struct Ahead {
  const char* patch = nullptr;            // the next row
  int64_t plane = 0, step = 0, size = 0;  // from plane to plane and row to row, and of a row
  int64_t rows = 1, count = 0;            // rows of a plane, and those that are left of all planes
  int64_t share = 0, row = 0;             // rows that a block of positions fetches; the next one in its plane
};

// `channels` channels of the patch that begins at `patch`, fetched in `blocks` shares.
template <class T>
Ahead ahead(const T* patch, const View& view, const Grid& g, int64_t channels, int64_t blocks) {
  constexpr int64_t bytes = sizeof(T);
  Ahead next{reinterpret_cast<const char*>(patch),
             view.channel * bytes,
             view.row * bytes,
             ((g.columns - 1) * view.pixel + (g.channels_last ? channels : 1)) * bytes,
             g.rows,
             g.rows * (g.channels_last ? 1 : channels)};
  next.share = (next.count + blocks - 1) / blocks;
  return next;
}

constexpr int64_t kCached = 512 << 10;  // bytes of points that stay in the second cache

// How a patch is cut into tiles of 2×2 results and blocks of rows of them, and the sizes of a block's
// buffers. `lanes` elements make a vector; region_points.inc says what the buffers hold.
struct TileCut {
  int64_t columns, rows, blocks, block_rows;  // tiles of a row, rows of a patch, and their blocks
  int64_t vectors, runs, run;                 // of a block's tiles; elements of a run
  int64_t pixels, results, filters;           // from point to point
  int64_t quarter, line, half;                // sizes of a channel's pixels and of a filter's results

  TileCut(const Grid& g, int64_t size, int64_t lanes, int64_t block, int64_t run_vectors) {
    const int64_t out = (g.out + block - 1) / block * block;
    columns = (g.columns + 1) / 2, rows = (g.rows + 1) / 2;
    const int64_t most = std::max<int64_t>(1, kCached / (16 * size * columns * (g.in + out)));
    blocks = (rows + most - 1) / most, block_rows = (rows + blocks - 1) / blocks;
    blocks = (rows + block_rows - 1) / block_rows;
    vectors = (block_rows * columns + lanes - 1) / lanes;
    runs = (vectors + run_vectors - 1) / run_vectors, run = g.in * run_vectors * lanes;
    // A vector more, since points a power of two apart would share a few sets of a cache.
    pixels = runs * run + lanes, results = vectors * lanes * out + lanes, filters = out * g.in + lanes;
    quarter = (vectors * lanes + 2 * columns) / lanes * lanes + 4 * lanes;
    line = (g.columns + lanes - 1) / lanes * lanes + lanes, half = 2 * vectors * lanes + lanes;
  }
};

}  // namespace
