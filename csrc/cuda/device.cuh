// What a kernel needs of the machine, in two forms: that of a GPU, and that of tests/cuda/emulator, where a
// C++ compiler builds the same kernels and fibers run their threads.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <array>
#include <map>
#include <mutex>
#else
#include "emulator.h"
#endif

#include <cstddef>
#include <cstdint>

namespace {

// A launch: `cluster` blocks share a cluster, 1 leaves every block on its own; 0 asks for a cooperative
// launch, all blocks resident at once.
struct Shape {
  int blocks, cluster, threads;
  size_t shared;
};

#ifdef __CUDACC__

__device__ inline unsigned char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<unsigned char*>(memory);
}

// All threads of a cluster; what they wrote before it, in shared memory too, is seen after it. Clusters are
// launched on sm_90 alone.
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// Where another block of the cluster has what lies at `mine` in this block's shared memory.
template <class T>
__device__ inline const T* in_block(const T* mine, int block) {
#if __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(block));
  return reinterpret_cast<const T*>(theirs);
#else
  __trap();
  return mine;
#endif
}

// The same for `target` arrivals of blocks that are all resident, through a counter in global memory that
// only grows (and wraps).
__device__ inline void grid_sync(unsigned* arrivals, unsigned target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
    unsigned seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrivals) : "memory");
    } while (static_cast<int>(seen - target) < 0);
  }
  __syncthreads();
}

__device__ inline void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// (low; high) += a · b on the tensor cores, (16 × 16) by (16 × 8); one warp.
__device__ inline void mma_bf16(float (&low)[2], float (&high)[2], const uint32_t (&a)[4],
                                const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(low[0]), "+f"(low[1]), "+f"(high[0]), "+f"(high[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_fp16(float (&low)[2], float (&high)[2], const uint32_t (&a)[4],
                                const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(low[0]), "+f"(low[1]), "+f"(high[0]), "+f"(high[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same, (16 × 8) by (8 × 8).
__device__ inline void mma_tf32(float (&low)[2], float (&high)[2], const uint32_t (&a)[4],
                                const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(low[0]), "+f"(low[1]), "+f"(high[0]), "+f"(high[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline float round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// The current device of a tensor's launch, made current, and the stream to launch on.
class Device {
 public:
  int multiprocessors, shared;
  bool clusters;
  cudaStream_t stream;

  explicit Device(int index) : guard_(index), index_(index) {
    int major = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    clusters = major >= 9;
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  // How many groups of `group` blocks run at the same time; asked once for each kernel and shape.
  template <class Arguments>
  int resident_groups(void (*kernel)(Arguments), const Shape& shape, int group) const {
    static std::map<std::array<size_t, 6>, int> known;
    static std::mutex one_at_a_time;
    const std::lock_guard lock(one_at_a_time);
    const auto [entry, is_new] = known.try_emplace(
        {static_cast<size_t>(index_), reinterpret_cast<size_t>(kernel), static_cast<size_t>(shape.cluster),
         static_cast<size_t>(shape.threads), shape.shared, static_cast<size_t>(group)},
        0);
    if (!is_new) return entry->second;
    const void* function = reinterpret_cast<const void*>(kernel);
    STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    int count = 0;
    cudaFuncAttributes made = {};
    STD_CUDA_CHECK(cudaFuncGetAttributes(&made, function));
    if (shape.cluster > 0 && made.ptxVersion < 90) return 0;  // compiled for GPUs without clusters
    if (shape.cluster > 0) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
      Launch launch(shape, stream);
      if (cudaOccupancyMaxActiveClusters(&count, function, &launch.config) != cudaSuccess) {
        count = 0;  // this GPU has no room for such a cluster
        cudaGetLastError();
      }
    } else {
      STD_CUDA_CHECK(
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, shape.threads, shape.shared));
      count = count * multiprocessors / group;
    }
    return entry->second = count;
  }

  template <class Arguments>
  void launch(void (*kernel)(Arguments), const Shape& shape, const Arguments& arguments) const {
    // What a kernel gets without asking.
    if (shape.shared > 48 << 10)
      STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    Launch launch(shape, stream);
    STD_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kernel, arguments));
  }

 private:
  struct Launch {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute;

    Launch(const Shape& shape, cudaStream_t stream) {
      config.gridDim = dim3(shape.blocks), config.blockDim = dim3(shape.threads);
      config.dynamicSmemBytes = shape.shared, config.stream = stream;
      if (shape.cluster > 0) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
      } else {
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
      }
      config.attrs = &attribute, config.numAttrs = shape.cluster != 1;
    }
    Launch(const Launch&) = delete;
  };

  torch::stable::accelerator::DeviceGuard guard_;
  int index_;
};

#endif

}  // namespace
