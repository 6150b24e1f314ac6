// The backward kernels of roi_crop, without atomics: who adds to a number is fixed, and in which order.
//
// roi_crop_gradients: a block owns a tile of an image's pixels and some channels, a thread one of the pixels
// and a slice of channels, whose sums stay in registers. The block brings the gradients of some regions to
// shared memory at a time, each read once; a thread adds those of the points whose cells have its pixel as a
// corner. Without rotation these are a range of columns by a range of rows, found once for each region, row
// and column; with it, all points are tried. From the same shared memory come the derivatives of the points'
// places: a thread per point and slice, then sums over columns, then over rows.
//
// roi_crop_finish: adds what the blocks found for a region, in their order.
#pragma once

#include "roi_crop.cuh"

namespace {

constexpr int kMostBackwardThreads = 608, kTerms = 6;

// Channels of a slice.
template <class T>
constexpr int depth_of = sizeof(T) == 8 ? 8 : 16;

template <class T>
struct Backward {
  CropShape s;
  const T *grad, *features;
  const accumulator<T>* rois;
  T* d_features;  // null where nobody asks
  double* terms;  // (regions of the call, tiles of channels, kTerms), or null
  bool channels_last;
  int side_x, side_y, across, squares;  // pixels of a block; blocks in a row of the image, and in all of it
  int slices, tiles;                    // of channels; tiles of `slices` slices
  int at_once, band;                    // regions, and rows of their crops, in shared memory together
  int stride_channel, stride_point;     // of the gradients in shared memory
};

// Of a region: its numbers are; it has points beside the block's pixels.
constexpr int kFinite = 1, kReaches = 2;

// Points of one region whose cells may have a pixel as a corner: [first, first + count) along an axis.
struct Range {
  int16_t first, count;
};

template <class T, bool kBoxes>
struct BackwardRoom {
  using A = accumulator<T>;
  A *grad, *normal_x, *normal_y, *slopes, *sums;  // normal_y: of the rows that are there
  Tap<A>* taps;                                   // boxes: columns, then rows of every region
  Point<A>* points;                               // else
  Range* ranges;  // boxes: the block's columns of pixels, then its rows, for every region
  double* terms;
  int* state;  // kFinite, kReaches
  size_t bytes;

  __host__ __device__ BackwardRoom(const Backward<T>& a, unsigned char* memory) {
    const int width = static_cast<int>(a.s.out_width), n = a.at_once, points_at_once = n * a.band * width;
    Pieces pieces{memory};
    grad = pieces.take<A>(a.channels_last ? points_at_once * a.stride_point
                                          : a.slices * depth_of<T> * a.stride_channel);
    normal_x = pieces.take<A>(width);
    normal_y = pieces.take<A>(a.band);
    taps = pieces.take<Tap<A>>(kBoxes ? n * (width + a.band) : 0);
    points = pieces.take<Point<A>>(kBoxes ? 0 : points_at_once);
    ranges = pieces.take<Range>(kBoxes ? n * (a.side_x + a.side_y) : 0);
    slopes = pieces.take<A>(a.terms ? 2 * a.slices * points_at_once : 0);
    sums = pieces.take<A>(a.terms ? 4 * n * a.band : 0);
    terms = pieces.take<double>(a.terms ? n * kTerms : 0);
    state = pieces.take<int>(n);
    bytes = pieces.used;
  }
};

// The regions [first, first + count) of an image and rows [top, top + rows) of their crops.
struct Part {
  int64_t image;
  int first, count, top, rows;
};

// How much a tap counts at a pixel.
template <class A>
__device__ inline A weight_at(const Tap<A>& tap, int pixel) {
  return tap.low == pixel ? tap.weight_low : tap.low + 1 == pixel ? tap.weight_high : A(0);
}

template <class T, bool kBoxes>
__device__ void place_points(const Backward<T>& a, const BackwardRoom<T, kBoxes>& room, const Part& part) {
  using A = accumulator<T>;
  const int width = static_cast<int>(a.s.out_width), entries = kBoxes ? width + part.rows : width * part.rows;
  for (int i = threadIdx.x; i < part.count * entries; i += blockDim.x) {
    const int n = i / entries, entry = i % entries;
    const int64_t roi = part.image * a.s.rois + part.first + n;
    const Region region = read_region<A>(a.rois + roi * a.s.roi_size(), a.s);
    if constexpr (kBoxes) {
      room.taps[i] = entry < width ? column_tap<A>(region, entry, a.s)
                                   : row_tap<A>(region, part.top + entry - width, a.s);
    } else {
      room.points[i] = point_at<A>(region, entry % width, part.top + entry / width, a.s);
    }
    if (entry == 0) room.state[n] = !region.finite ? 0 : a.squares > 1 ? kFinite : kFinite | kReaches;
  }
  for (int i = threadIdx.x; i < part.rows; i += blockDim.x)
    room.normal_y[i] =
        static_cast<A>(numerator(part.top + i, a.s.out_height) / divisor(a.s.out_height, a.s.align_corners));
}

// Large maps: regions whose points all lie elsewhere are passed over.
template <class T, bool kBoxes>
__device__ void find_reaching(const Backward<T>& a, const BackwardRoom<T, kBoxes>& room, const Part& part,
                              int left, int above) {
  const int width = static_cast<int>(a.s.out_width), points = part.rows * width;
  const auto beside_x = [&](const auto& tap) { return tap.low >= left - 1 && tap.low < left + a.side_x; };
  const auto beside_y = [&](const auto& tap) { return tap.low >= above - 1 && tap.low < above + a.side_y; };
  for (int n = threadIdx.x; n < part.count; n += blockDim.x) {
    bool reaches = false;
    if constexpr (kBoxes) {
      const auto* taps = room.taps + n * (width + part.rows);
      bool columns = false;
      for (int u = 0; u < width; ++u) columns = columns || beside_x(taps[u]);
      for (int v = 0; v < part.rows; ++v) reaches = reaches || (columns && beside_y(taps[width + v]));
    } else {
      for (int p = 0; p < points; ++p) {
        const auto& point = room.points[n * points + p];
        reaches = reaches || (beside_x(point.x) && beside_y(point.y));
      }
    }
    if (reaches && room.state[n]) room.state[n] = kFinite | kReaches;
  }
}

// A box moves one way, so the points that reach a pixel follow each other.
template <class T>
__device__ void find_ranges(const Backward<T>& a, const BackwardRoom<T, true>& room, const Part& part,
                            int left, int above) {
  const int width = static_cast<int>(a.s.out_width), entries = width + part.rows, sides = a.side_x + a.side_y;
  for (int i = threadIdx.x; i < part.count * sides; i += blockDim.x) {
    const int n = i / sides, side = i % sides;
    const bool along_x = side < a.side_x;
    const int pixel = along_x ? left + side : above + side - a.side_x, points = along_x ? width : part.rows;
    const auto* taps = room.taps + n * entries + (along_x ? 0 : width);
    int first = 0, count = 0;
    for (int p = 0; p < points; ++p) {
      if (taps[p].low != pixel && taps[p].low + 1 != pixel) continue;
      if (count == 0) first = p;
      count = p - first + 1;
    }
    room.ranges[i] = {static_cast<int16_t>(first), static_cast<int16_t>(count)};
  }
}

// The part's gradients of the block's channels, those beyond the last as zeros; of all regions, or of those
// that reach the block's pixels.
template <class T, bool kBoxes>
__device__ void read_gradients(const Backward<T>& a, const BackwardRoom<T, kBoxes>& room, const Part& part,
                               int first_channel, bool all) {
  using A = accumulator<T>;
  const int points = part.rows * static_cast<int>(a.s.out_width), tile = a.slices * depth_of<T>,
            channels = static_cast<int>(a.s.channels);
  const int64_t area = a.s.out_height * a.s.out_width, roi = part.image * a.s.rois + part.first;
  const T* from = a.grad + roi * a.s.channels * area;
  const int64_t skipped = part.top * a.s.out_width;
  // Digits: in planes (point, channel, region), else (channel, point, region).
  Odometer at(threadIdx.x, blockDim.x, a.channels_last ? tile : points, a.channels_last ? points : tile);
#pragma unroll 4
  for (int i = threadIdx.x; i < part.count * points * tile; i += blockDim.x, at.next()) {
    const int c = a.channels_last ? at.a : at.b, p = a.channels_last ? at.b : at.a,
              channel = first_channel + c;
    if (!all && !(room.state[at.c] & kReaches)) continue;
    const int64_t point = skipped + p;
    A value = 0;
    if (channel < channels)
      value =
          static_cast<A>(from[at.c * a.s.channels * area +
                              (a.channels_last ? point * a.s.channels + channel : channel * area + point)]);
    room.grad[c * a.stride_channel + (at.c * points + p) * a.stride_point] = value;
  }
}

// Adds the part's gradients to one pixel's sums.
template <class T, bool kBoxes>
__device__ void gather(const Backward<T>& a, const BackwardRoom<T, kBoxes>& room, const Part& part,
                       const accumulator<T>* grad, int pixel, int left, int above,
                       accumulator<T> (&sum)[depth_of<T>]) {
  using A = accumulator<T>;
  const int width = static_cast<int>(a.s.out_width), points = part.rows * width;
  const int column = pixel % a.side_x, row = pixel / a.side_x, x = left + column, y = above + row;
  const auto add = [&](A weight, int point) {
    const A* from = grad + point * a.stride_point;
#pragma unroll
    for (int c = 0; c < depth_of<T>; ++c) sum[c] += weight * from[c * a.stride_channel];
  };
  for (int n = 0; n < part.count; ++n) {
    if (!(room.state[n] & kReaches)) continue;
    if constexpr (kBoxes) {
      const Range* ranges = room.ranges + n * (a.side_x + a.side_y);
      const Range columns = ranges[column], rows = ranges[a.side_x + row];
      const Tap<A>* taps = room.taps + n * (width + part.rows);
      for (int v = rows.first; v < rows.first + rows.count; ++v) {
        const A down = weight_at(taps[width + v], y);
        for (int u = columns.first; u < columns.first + columns.count; ++u)
          add(down * weight_at(taps[u], x), n * points + v * width + u);
      }
    } else {
      for (int p = 0; p < points; ++p) {
        const Point<A> point = room.points[n * points + p];
        const int right = x - point.x.low, below = y - point.y.low;
        if (right < 0 || right > 1 || below < 0 || below > 1) continue;
        add(weight_at(point.x, x) * weight_at(point.y, y), n * points + p);
      }
    }
  }
}

// d/dix and d/diy of every point, each over one slice of channels.
template <class T, bool kBoxes>
__device__ void find_slopes(const Backward<T>& a, const BackwardRoom<T, kBoxes>& room, const Part& part,
                            int first_channel) {
  using A = accumulator<T>;
  const CropShape& s = a.s;
  const int width = static_cast<int>(s.out_width), points = part.rows * width, all = part.count * points;
  const int64_t pixels = s.height * s.width, channel_step = a.channels_last ? 1 : pixels,
                pixel_step = a.channels_last ? s.channels : 1;
  for (int i = threadIdx.x; i < all * a.slices; i += blockDim.x) {
    const int slice = i / all, point = i % all, n = point / points, p = point % points;
    Tap<A> x, y;
    if constexpr (kBoxes) {
      const Tap<A>* taps = room.taps + n * (width + part.rows);
      x = taps[p % width], y = taps[width + p / width];
    } else {
      x = room.points[point].x, y = room.points[point].y;
    }
    const int first = first_channel + slice * depth_of<T>,
              count = min(depth_of<T>, static_cast<int>(s.channels) - first);
    const bool left = x.low >= 0 && x.low < s.width, right = x.low + 1 < s.width;
    const bool upper = y.low >= 0 && y.low < s.height, lower = y.low + 1 < s.height;
    const T* corner = a.features + (part.image * s.channels * pixels + first * channel_step) +
                      (int64_t{y.low} * s.width + x.low) * pixel_step;
    const A* grad = room.grad + slice * depth_of<T> * a.stride_channel + point * a.stride_point;
    // A whole sample outside has no cell: its weights are zero.
    const bool inside =
        (room.state[n] & kFinite) && x.weight_low + x.weight_high > 0 && y.weight_low + y.weight_high > 0;
    A along_x = 0, along_y = 0;
    for (int c = 0; inside && c < count; ++c, corner += channel_step) {
      const A f00 = upper && left ? static_cast<A>(corner[0]) : A(0);
      const A f01 = upper && right ? static_cast<A>(corner[pixel_step]) : A(0);
      const A f10 = lower && left ? static_cast<A>(corner[s.width * pixel_step]) : A(0);
      const A f11 = lower && right ? static_cast<A>(corner[(s.width + 1) * pixel_step]) : A(0);
      const A g = grad[c * a.stride_channel];
      along_x += g * (y.weight_low * (f01 - f00) + y.weight_high * (f11 - f10));
      along_y += g * (x.weight_low * (f10 - f00) + x.weight_high * (f11 - f01));
    }
    room.slopes[i] = along_x;
    room.slopes[all * a.slices + i] = along_y;
  }
}

// Sums over channels and columns, one number per region, row of its crop, axis, and factor 1 or x̂.
template <class T, bool kBoxes>
__device__ void sum_columns(const Backward<T>& a, const BackwardRoom<T, kBoxes>& room, const Part& part) {
  using A = accumulator<T>;
  const int width = static_cast<int>(a.s.out_width), rows = part.count * part.rows, all = rows * width;
  for (int i = threadIdx.x; i < 4 * rows; i += blockDim.x) {
    const int row = i / 4, axis = i / 2 % 2;
    const A* slopes = room.slopes + axis * all * a.slices + row * width;
    A sum = 0;
    for (int u = 0; u < width; ++u) {
      A slope = 0;
      for (int slice = 0; slice < a.slices; ++slice) slope += slopes[slice * all + u];
      sum += i % 2 ? slope * room.normal_x[u] : slope;
    }
    room.sums[i] = sum;
  }
}

// Adds the rows' sums to the terms of each region: (Σ x̂, Σ ŷ, Σ 1) for each axis.
template <class T, bool kBoxes>
__device__ void sum_rows(const Backward<T>& a, const BackwardRoom<T, kBoxes>& room, const Part& part) {
  for (int i = threadIdx.x; i < part.count * kTerms; i += blockDim.x) {
    const int n = i / kTerms, term = i % kTerms, axis = term / 3, factor = term % 3;
    double sum = part.top == 0 ? 0.0 : room.terms[i];
    for (int v = 0; v < part.rows; ++v) {
      const auto* row = room.sums + ((n * part.rows + v) * 2 + axis) * 2;
      sum += factor == 0 ? row[1] : factor == 1 ? row[0] * room.normal_y[v] : row[0];
    }
    room.terms[i] = sum;
  }
}

template <class T, bool kBoxes>
__global__ void __launch_bounds__(kMostBackwardThreads)
    roi_crop_gradients(const __grid_constant__ Backward<T> a) {
  using A = accumulator<T>;
  const CropShape& s = a.s;
  const BackwardRoom<T, kBoxes> room(a, shared_memory());
  const int square = blockIdx.x % a.squares, tile = blockIdx.x / a.squares % a.tiles;
  const int64_t image = blockIdx.x / a.squares / a.tiles;
  const int left = square % a.across * a.side_x, above = square / a.across * a.side_y,
            first_channel = tile * a.slices * depth_of<T>;
  const int pixels = a.side_x * a.side_y, pixel = threadIdx.x % pixels, slice = threadIdx.x / pixels;
  const bool owns = a.d_features && slice < a.slices;
  const bool with_terms = a.terms && square == 0;  // the points are those of all squares
  A sum[depth_of<T>] = {};
  for (int i = threadIdx.x; i < s.out_width; i += blockDim.x)
    room.normal_x[i] = static_cast<A>(numerator(i, s.out_width) / divisor(s.out_width, s.align_corners));
  for (int first = 0; first < s.rois; first += a.at_once) {
    for (int top = 0; top < s.out_height; top += a.band) {
      const Part part{image, first, min(a.at_once, static_cast<int>(s.rois) - first), top,
                      min(a.band, static_cast<int>(s.out_height) - top)};
      __syncthreads();
      place_points(a, room, part);
      __syncthreads();
      if (a.squares > 1) {
        find_reaching(a, room, part, left, above);
        __syncthreads();
      }
      read_gradients(a, room, part, first_channel, with_terms);
      if constexpr (kBoxes) {
        if (a.d_features) find_ranges(a, room, part, left, above);
      }
      __syncthreads();
      if (owns)
        gather(a, room, part, room.grad + slice * depth_of<T> * a.stride_channel, pixel, left, above, sum);
      if (!with_terms) continue;
      find_slopes(a, room, part, first_channel);
      __syncthreads();
      sum_columns(a, room, part);
      __syncthreads();
      sum_rows(a, room, part);
      if (top + part.rows < s.out_height) continue;
      // Each thread takes what it has summed itself.
      for (int i = threadIdx.x; i < part.count * kTerms; i += blockDim.x)
        a.terms[((image * s.rois + first + i / kTerms) * a.tiles + tile) * kTerms + i % kTerms] =
            room.terms[i];
    }
  }
  const int64_t x = left + pixel % a.side_x, y = above + pixel / a.side_x;
  if (!owns || x >= s.width || y >= s.height) return;
  const int64_t area = s.height * s.width, first = first_channel + slice * depth_of<T>;
  T* to = a.d_features + image * s.channels * area +
          (a.channels_last ? (y * s.width + x) * s.channels + first : first * area + y * s.width + x);
#pragma unroll
  for (int c = 0; c < depth_of<T>; ++c)
    if (first + c < s.channels) to[c * (a.channels_last ? 1 : area)] = static_cast<T>(sum[c]);
}

template <class A>
struct Finish {
  CropShape s;
  const double* terms;
  A* d_rois;
  int tiles;
};

constexpr int kFinishThreads = 128;

template <class A>
__global__ void __launch_bounds__(kFinishThreads) roi_crop_finish(const __grid_constant__ Finish<A> a) {
  const int64_t roi = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (roi >= a.s.batch * a.s.rois) return;
  double sums[kTerms] = {};
  for (int tile = 0; tile < a.tiles; ++tile)
    for (int k = 0; k < kTerms; ++k) sums[k] += a.terms[(roi * a.tiles + tile) * kTerms + k];
  to_roi_gradient(sums, a.s, a.d_rois + roi * a.s.roi_size());
}

}  // namespace
