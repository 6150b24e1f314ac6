// The forward kernels of roi_crop.
//
// roi_crop_boxes: a block holds a tile of channels of one image in shared memory, so that features are read
// once, and takes a group of regions from there; a warp takes one region after the other. A lane owns a
// column of a crop and a vector of channels and walks down its rows: a row of the map that serves two rows of
// the crop is loaded and blended once. With channels innermost (channels_last) lanes store what they make; in
// planes a warp gathers the crops of some channels in its own piece of shared memory and stores them as one
// long run.
//
// roi_crop_any: everything else (rotated regions, maps that do not fit): a block per region and some
// channels, taps from global memory.
#pragma once

#include "roi_crop.cuh"

namespace {

constexpr int kForwardWarps = 8, kPointsAtOnce = 256;

template <class T>
struct ForwardBoxes {
  CropShape s;
  const T* features;
  const accumulator<T>* rois;
  T* out;
  int tile, tiles;  // channels of a block, and how many such
  int groups;       // of regions of an image, each with its own block
  int at_once;      // regions whose taps are held together
  int gathered;     // channels of a gathered run, in planes
  bool vectors;     // runs of crops are whole, aligned vectors of 16 bytes
};

// How shared memory is laid out. A row of the map has one zero pixel before and one after it; the one before
// the next row follows, so that any two neighbours from -1 on can be read.
template <class T, int kVector, bool kLast>
struct BoxesRoom {
  using A = accumulator<T>;
  using V = Pack<T, kVector>;
  int stride, plane;  // from row to row, and from vector to vector in planes, in pixels
  V* map;
  T* gather;
  Tap<A>* taps;
  int* finite;
  size_t bytes;

  __host__ __device__ BoxesRoom(const ForwardBoxes<T>& a, unsigned char* memory) {
    const int vectors = a.tile / kVector, height = static_cast<int>(a.s.height);
    stride = static_cast<int>(a.s.width) + 2;
    plane = height * stride + 1;
    // Neighbouring vectors of channels start some banks apart.
    if (!kLast) plane += (7 - plane % 32 + 32) % 32;
    Pieces pieces{memory};
    map = pieces.take<V>(plane * vectors);
    gather = pieces.take<T>(kLast ? 0 : kForwardWarps * padded_run(a));
    taps = pieces.take<Tap<A>>(a.at_once * static_cast<int>(a.s.out_width + a.s.out_height));
    finite = pieces.take<int>(a.at_once);
    bytes = pieces.used;
  }

  // Elements of a warp's gathered run, in whole 16 bytes.
  static __host__ __device__ int padded_run(const ForwardBoxes<T>& a) {
    constexpr int whole = 16 / sizeof(T);
    const int run = a.gathered * static_cast<int>(a.s.out_height * a.s.out_width);
    return (run + whole - 1) / whole * whole;
  }
};

// Channels [first, first + tile) of one image to shared memory; those beyond the last are zero.
template <class T, int kVector, bool kLast>
__device__ void read_map(const ForwardBoxes<T>& a, const BoxesRoom<T, kVector, kLast>& room, const T* image,
                         int first) {
  const int height = static_cast<int>(a.s.height), width = static_cast<int>(a.s.width),
            vectors = a.tile / kVector, channels = static_cast<int>(a.s.channels);
  const int64_t area = a.s.height * a.s.width;
  const Pack<T, kVector> zero = {};
  // Digits: in planes (x, y, vector), else (vector, x, y).
  Odometer at(threadIdx.x, blockDim.x, kLast ? vectors : width, kLast ? width : height);
#pragma unroll 4
  for (int i = threadIdx.x; i < height * width * vectors; i += blockDim.x, at.next()) {
    const int k = kLast ? at.a : at.c, x = kLast ? at.b : at.a, y = kLast ? at.c : at.b;
    const int64_t pixel = static_cast<int64_t>(y) * width + x;
    const int channel = first + k * kVector, place = y * room.stride + x + 1;
    Pack<T, kVector> value = zero;
    if constexpr (kLast) {
      if (channel < channels)
        value = *reinterpret_cast<const Pack<T, kVector>*>(image + pixel * channels + channel);
      room.map[place * vectors + k] = value;
    } else {
#pragma unroll
      for (int n = 0; n < kVector; ++n)
        if (channel + n < channels) value.x[n] = image[(channel + n) * area + pixel];
      room.map[k * room.plane + place] = value;
    }
  }
  // The pixels outside: before every row, after it, and after all.
  for (int i = threadIdx.x; i < (2 * height + 1) * vectors; i += blockDim.x) {
    const int k = i % vectors, place = i / vectors / 2 * room.stride + i / vectors % 2 * (width + 1);
    room.map[kLast ? place * vectors + k : k * room.plane + place] = zero;
  }
}

// Walks down a column of a crop: calls emit(row of the crop, its channels).
template <int kVector, class A, class T, class Emit>
__device__ void walk_column(const Pack<T, kVector>* map, int row_step, int pixel_step, int height,
                            const Tap<A>& x, const Tap<A>* rows, int count, const Emit& emit) {
  A upper[kVector] = {}, lower[kVector] = {};
  const Pack<T, kVector>* left = map + (x.low + 1) * pixel_step;
  const auto blend = [&](int y, A(&row)[kVector]) {
    if (static_cast<unsigned>(y) >= static_cast<unsigned>(height)) {
      for (int n = 0; n < kVector; ++n) row[n] = 0;
      return;
    }
    const Pack<T, kVector> a = left[y * row_step], b = left[y * row_step + pixel_step];
#pragma unroll
    for (int n = 0; n < kVector; ++n)
      row[n] = x.weight_low * static_cast<A>(a.x[n]) + x.weight_high * static_cast<A>(b.x[n]);
  };
  int above = -3;  // the row of the map in `upper`
  for (int v = 0; v < count; ++v) {
    const Tap<A> y = rows[v];  // the same for the whole warp
    if (y.low == above + 1) {
#pragma unroll
      for (int n = 0; n < kVector; ++n) upper[n] = lower[n];
      blend(y.low + 1, lower);
    } else if (y.low != above) {
      blend(y.low, upper);
      blend(y.low + 1, lower);
    }
    above = y.low;
    A value[kVector];
#pragma unroll
    for (int n = 0; n < kVector; ++n) value[n] = y.weight_low * upper[n] + y.weight_high * lower[n];
    emit(v, value);
  }
}

// `count` elements from a warp's piece of shared memory.
template <class T>
__device__ void store_run(T* to, const T* from, int count, bool vectors) {
  constexpr int kWhole = 16 / sizeof(T);
  const int lane = threadIdx.x % 32;
  if (vectors) {
    using V = Pack<T, kWhole>;
    for (int i = lane; i < count / kWhole; i += 32)
      reinterpret_cast<V*>(to)[i] = reinterpret_cast<const V*>(from)[i];
  } else {
    for (int i = lane; i < count; i += 32) to[i] = from[i];
  }
}

// One region, by one warp: `taps` has its columns and then its rows, `to` is its crop's first channel of the
// tile, of which `channels` exist.
template <class T, int kVector, bool kLast>
__device__ void crop_box(const ForwardBoxes<T>& a, const BoxesRoom<T, kVector, kLast>& room,
                         const Tap<accumulator<T>>* taps, bool finite, T* to, int channels) {
  using A = accumulator<T>;
  const int width = static_cast<int>(a.s.out_width), height = static_cast<int>(a.s.out_height),
            lane = threadIdx.x % 32, points = width * height, vectors = a.tile / kVector;
  const int step = kLast ? a.tile : a.gathered;  // channels at a time
  T* gather = room.gather + threadIdx.x / 32 * room.padded_run(a);
  const int map_height = static_cast<int>(a.s.height);
  for (int first = 0; first < channels; first += step) {
    const int here = min(step, channels - first), vectors_here = (here + kVector - 1) / kVector;
    Odometer at(lane, 32, kLast ? vectors_here : width, kLast ? width : vectors_here);
    for (int i = lane; i < vectors_here * width; i += 32, at.next()) {
      const int u = kLast ? at.b : at.a, k = kLast ? at.a : at.b, vector = first / kVector + k;
      const Pack<T, kVector>* map = room.map + (kLast ? vector : vector * room.plane);
      const int pixel_step = kLast ? vectors : 1;
      walk_column<kVector>(
          map, room.stride * pixel_step, pixel_step, map_height, taps[u], taps + width, height,
          [&](int v, const A(&value)[kVector]) {
            Pack<T, kVector> pack;
#pragma unroll
            for (int n = 0; n < kVector; ++n)
              pack.x[n] = static_cast<T>(finite ? value[n] : not_a_number<A>());
            const int point = v * width + u;
            if constexpr (kLast) {
              *reinterpret_cast<Pack<T, kVector>*>(to + point * a.s.channels + vector * kVector) = pack;
            } else {
#pragma unroll
              for (int n = 0; n < kVector; ++n) gather[(k * kVector + n) * points + point] = pack.x[n];
            }
          });
    }
    if (kLast) continue;
    __syncwarp();
    store_run(to + static_cast<int64_t>(first) * points, gather, here * points, a.vectors);
    __syncwarp();
  }
}

template <class T, int kVector, bool kLast>
__global__ void __launch_bounds__(kForwardWarps * 32, 3)
    roi_crop_boxes(const __grid_constant__ ForwardBoxes<T> a) {
  using A = accumulator<T>;
  const BoxesRoom<T, kVector, kLast> room(a, shared_memory());
  const CropShape& s = a.s;
  const int64_t image = blockIdx.x / (a.groups * a.tiles);
  const int group = blockIdx.x % a.groups, first_channel = blockIdx.x / a.groups % a.tiles * a.tile,
            channels = min(a.tile, static_cast<int>(s.channels) - first_channel);
  const int width = static_cast<int>(s.out_width), entries = width + static_cast<int>(s.out_height);
  read_map<T, kVector, kLast>(a, room, a.features + image * s.channels * s.height * s.width, first_channel);
  const int begin = static_cast<int>(group * s.rois / a.groups),
            end = static_cast<int>((group + 1) * s.rois / a.groups);
  for (int first = begin; first < end; first += a.at_once) {
    const int count = min(a.at_once, end - first);
    __syncthreads();
    for (int i = threadIdx.x; i < count * entries; i += blockDim.x) {
      const int n = i / entries, entry = i % entries;
      const Region region = read_region<A>(a.rois + (image * s.rois + first + n) * 4, s);
      room.taps[i] = entry < width ? column_tap<A>(region, entry, s) : row_tap<A>(region, entry - width, s);
      if (entry == 0) room.finite[n] = region.finite;
    }
    __syncthreads();
    for (int n = threadIdx.x / 32; n < count; n += kForwardWarps) {
      const int64_t crop = (image * s.rois + first + n) * s.channels * s.out_height * s.out_width;
      const int64_t channel = kLast ? first_channel : first_channel * s.out_height * s.out_width;
      crop_box<T, kVector, kLast>(a, room, room.taps + n * entries, room.finite[n] != 0,
                                  a.out + crop + channel, channels);
    }
  }
}

template <class T>
struct ForwardAny {
  CropShape s;
  const T* features;
  const accumulator<T>* rois;
  T* out;
  int tile, tiles;  // channels of a block, and how many such
  bool channels_last;
};

template <class T>
__global__ void __launch_bounds__(kPointsAtOnce) roi_crop_any(const __grid_constant__ ForwardAny<T> a) {
  using A = accumulator<T>;
  const CropShape& s = a.s;
  Point<A>* points = Pieces{shared_memory()}.take<Point<A>>(kPointsAtOnce);
  const int64_t roi = blockIdx.x / a.tiles, area = s.out_height * s.out_width, pixels = s.height * s.width;
  const int first_channel = blockIdx.x % a.tiles * a.tile,
            channels = min(a.tile, static_cast<int>(s.channels) - first_channel);
  const Region region = read_region<A>(a.rois + roi * s.roi_size(), s);
  const int64_t channel_step = a.channels_last ? 1 : pixels, pixel_step = a.channels_last ? s.channels : 1;
  const T* map = a.features + roi / s.rois * s.channels * pixels + first_channel * channel_step;
  T* to = a.out + roi * s.channels * area + first_channel * (a.channels_last ? 1 : area);
  for (int64_t first = 0; first < area; first += kPointsAtOnce) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kPointsAtOnce), area - first));
    __syncthreads();
    for (int p = threadIdx.x; p < count; p += blockDim.x) {
      const int64_t point = first + p;
      points[p] = point_at<A>(region, static_cast<int>(point % s.out_width),
                              static_cast<int>(point / s.out_width), s);
    }
    __syncthreads();
    Odometer at(threadIdx.x, blockDim.x, a.channels_last ? channels : count,
                a.channels_last ? count : channels);
    for (int i = threadIdx.x; i < count * channels; i += blockDim.x, at.next()) {
      const int p = a.channels_last ? at.b : at.a, c = a.channels_last ? at.a : at.b;
      const Tap<A> x = points[p].x, y = points[p].y;
      A value = 0;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t column = int64_t{x.low} + corner % 2, row = int64_t{y.low} + corner / 2;
        if (column < 0 || column >= s.width || row < 0 || row >= s.height) continue;
        const A weight =
            (corner % 2 ? x.weight_high : x.weight_low) * (corner / 2 ? y.weight_high : y.weight_low);
        value += weight * static_cast<A>(map[(row * s.width + column) * pixel_step + c * channel_step]);
      }
      const int64_t point = first + p;
      to[a.channels_last ? point * s.channels + c : c * area + point] =
          static_cast<T>(region.finite ? value : not_a_number<A>());
    }
  }
}

}  // namespace
