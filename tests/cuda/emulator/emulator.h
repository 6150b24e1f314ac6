// The host form of csrc/cuda/device.cuh: a C++ compiler builds the kernels, and every thread of a launch runs
// as a fiber. Blocks of a cluster, or of a cooperative launch, run together; shared memory starts as NaN and
// ends at a page that must not be touched; a barrier that not all threads reach is an error, not a hang.
//
// AUFAST_EMULATED_DEVICE names the device (sm_90, sm_80, sm_86). AUFAST_EMULATED_ORDER chooses who runs next:
// 0 in turn, any other number a random order of its own; a kernel with a missing barrier gives other bits
// then.
#pragma once

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using std::min;

namespace emulator {

struct Index {
  int x;
};
struct Block;

// The operands of one lane in a product of its warp.
struct Lane {
  float *low, *high;  // sums of two rows
  const uint32_t *a, *b;
};

struct Thread {
  jmp_buf place;
  ucontext_t start;
  Index thread, block, threads, blocks;
  Block* in;
  void* stack;
  bool started = false, finished = false;
  const unsigned* counter = nullptr;  // spins until it has reached `target`
  unsigned target;
};

struct Barrier {
  int arrived = 0;
  std::vector<Thread*> waiting;
};

struct Warp {
  Barrier barrier;
  Lane lanes[32];
  const char* operation;
};

struct Block {
  unsigned char* shared;
  size_t size;
  int finished = 0;
  std::vector<Block>* cluster;
  Barrier barrier;
  std::vector<Warp> warps;
};

inline constexpr size_t kStack = 64 << 10;

// Memory whose last byte lies before a page that must not be touched, filled with NaN.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    bytes = (bytes + 15) / 16 * 16;
    room_ = (bytes + page - 1) / page * page;
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, room_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_ + room_, page, PROT_NONE);
    std::memset(base_, 0xff, room_);
    start_ = base_ + room_ - bytes;
    room_ += page;
  }
  Guarded(Guarded&& other) : base_(other.base_), start_(other.start_), room_(other.room_) {
    other.base_ = nullptr;
  }
  ~Guarded() {
    if (base_ != nullptr) munmap(base_, room_);
  }
  unsigned char* get() const { return start_; }

 private:
  unsigned char *base_, *start_;
  size_t room_;
};

class Machine {
 public:
  Thread* running = nullptr;

  // Runs one cluster, or all blocks of a cooperative launch, `body` being a thread's work.
  void run(int first, int count, int blocks, int threads, size_t shared, const std::function<void()>& body) {
    body_ = &body;
    std::vector<Guarded> memory;
    std::vector<Block> cluster(count);
    std::vector<std::unique_ptr<Thread>> all;
    ready_.assign(count, {});
    first_ = first, favoured_ = 0, ready_count_ = 0;
    Guarded stacks(kStack * count * threads);
    for (int b = 0; b < count; ++b) {
      memory.emplace_back(shared);
      cluster[b].shared = memory.back().get(), cluster[b].size = shared, cluster[b].cluster = &cluster;
      cluster[b].warps.resize(threads / 32);
      for (int t = 0; t < threads; ++t) {
        auto thread = std::make_unique<Thread>();
        thread->thread = {t}, thread->block = {first + b}, thread->threads = {threads};
        thread->blocks = {blocks}, thread->in = &cluster[b];
        thread->stack = stacks.get() + kStack * all.size();
        make_ready(thread.get());
        all.push_back(std::move(thread));
      }
    }
    cluster_barrier_ = {};
    threads_ = count * threads, finished_ = 0, failure_.clear();
    const char* order = std::getenv("AUFAST_EMULATED_ORDER");
    seed_ = order == nullptr ? 0 : std::atoi(order);
    random_.seed(seed_);
    while (finished_ < threads_ && failure_.empty()) resume(next());
    spinning_.clear();
    if (!failure_.empty()) throw std::runtime_error("emulated launch: " + failure_);
  }

  void meet(Barrier& barrier, int expected) {
    if (++barrier.arrived < expected) {
      barrier.waiting.push_back(running);
      return pause();
    }
    release(barrier);
  }
  void meet_cluster() { meet(cluster_barrier_, threads_); }
  void meet_warp() { meet(running->in->warps[running->thread.x / 32].barrier, 32); }
  void meet_block() { meet(running->in->barrier, running->threads.x); }

  void spin(const unsigned* counter, unsigned target) {
    if (static_cast<int>(*counter - target) >= 0) return;
    running->counter = counter, running->target = target;
    spinning_.push_back(running);
    pause();
  }

  // A product of one warp: the lane that comes last computes it for all.
  void multiply(const char* operation, const Lane& lane, void (*compute)(const Lane*)) {
    Warp& warp = running->in->warps[running->thread.x / 32];
    if (warp.barrier.arrived == 0) warp.operation = operation;
    if (std::strcmp(warp.operation, operation) != 0) fail("a warp's lanes call different products");
    warp.lanes[running->thread.x % 32] = lane;
    if (warp.barrier.arrived == 31) compute(warp.lanes);
    meet(warp.barrier, 32);
  }

  static void begin();

 private:
  void release(Barrier& barrier) {
    barrier.arrived = 0;
    for (Thread* thread : barrier.waiting) make_ready(thread);
    barrier.waiting.clear();
  }

  [[gnu::noinline]] void pause() {
    if (_setjmp(running->place) == 0) _longjmp(scheduler_, 1);
  }

  void fail(const char* why) {
    failure_ = why;
    _longjmp(scheduler_, 1);
  }

  void make_ready(Thread* thread) {
    ready_[thread->block.x - first_].push_back(thread);
    ++ready_count_;
  }

  Thread* next() {
    if (ready_count_ == 0) {
      for (size_t i = 0; i < spinning_.size();) {
        Thread* thread = spinning_[i];
        if (static_cast<int>(*thread->counter - thread->target) >= 0) {
          make_ready(thread);
          spinning_[i] = spinning_.back();
          spinning_.pop_back();
        } else {
          ++i;
        }
      }
    }
    if (ready_count_ == 0) {
      failure_ = "a barrier waits for threads that never come (" + std::to_string(finished_) + " of " +
                 std::to_string(threads_) + " have ended)";
      return nullptr;
    }
    if (seed_ % 2 == 1) favoured_ = random_() % ready_.size();
    while (ready_[favoured_].empty())
      favoured_ = seed_ == 0 ? (favoured_ + 1) % ready_.size() : random_() % ready_.size();
    std::deque<Thread*>& ready = ready_[favoured_];
    if (seed_ == 0)
      favoured_ = (favoured_ + 1) % ready_.size();
    else
      std::swap(ready.front(), ready[random_() % ready.size()]);
    Thread* thread = ready.front();
    ready.pop_front();
    --ready_count_;
    return thread;
  }

  [[gnu::noinline]] void resume(Thread* thread) {
    if (thread == nullptr) return;
    running = thread;
    if (_setjmp(scheduler_) != 0) return;
    if (thread->started) _longjmp(thread->place, 1);
    thread->started = true;
    getcontext(&thread->start);
    thread->start.uc_stack.ss_sp = thread->stack;
    thread->start.uc_stack.ss_size = kStack;
    thread->start.uc_link = nullptr;
    makecontext(&thread->start, &Machine::begin, 0);
    setcontext(&thread->start);
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<std::deque<Thread*>> ready_;  // of every block
  size_t ready_count_ = 0, favoured_ = 0;
  int first_ = 0;  // block
  std::vector<Thread*> spinning_;
  Barrier cluster_barrier_;
  jmp_buf scheduler_;
  int threads_ = 0, finished_ = 0;
  unsigned seed_ = 0;
  std::mt19937 random_;
  std::string failure_;
};

inline Machine machine;

inline void Machine::begin() {
  (*machine.body_)();
  machine.running->finished = true;
  ++machine.finished_;
  Block& block = *machine.running->in;
  if (++block.finished == machine.running->threads.x)
    std::memset(block.shared, 0xff, block.size);  // it is gone
  _longjmp(machine.scheduler_, 1);
}

inline const char* device_name() {
  const char* name = std::getenv("AUFAST_EMULATED_DEVICE");
  return name == nullptr ? "sm_90" : name;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float from_bf16(uint32_t bits) {
  return from_bits(bits << 16);
}

inline float from_fp16(uint32_t bits) {
  _Float16 value;
  const uint16_t low = bits;
  std::memcpy(&value, &low, 2);
  return value;
}

// Lane 4g + t holds the sums (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <int depth>
void add_product(const Lane* lanes, const float (&a)[16][depth], const float (&b)[depth][8]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      float& sum = (i < 2 ? lanes[lane].low : lanes[lane].high)[i % 2];
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
    }
}

// mma.m16n8k16 with factors of 16 bits, as the PTX manual lays out its fragments: lane 4g + t holds of a the
// elements (g, 2t …), (g + 8, 2t …), (g, 2t + 8 …), (g + 8, 2t + 8 …), of b (2t …, g), (2t + 8 …, g).
template <float (*From)(uint32_t)>
void multiply_16bit(const Lane* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int word = 0; word < 4; ++word)
        a[g + 8 * (word % 2)][8 * (word / 2) + 2 * t + half] =
            From(lanes[lane].a[word] >> 16 * half & 0xffff);
      for (int word = 0; word < 2; ++word)
        b[8 * word + 2 * t + half][g] = From(lanes[lane].b[word] >> 16 * half & 0xffff);
    }
  }
  add_product<16>(lanes, a, b);
}

// mma.m16n8k8 with TF32 factors, whose last 13 bits are not looked at: a (g, t), (g + 8, t), (g, t + 4),
// (g + 8, t + 4); b (t, g), (t + 4, g).
inline void multiply_tf32(const Lane* lanes) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int word = 0; word < 4; ++word)
      a[g + 8 * (word % 2)][4 * (word / 2) + t] = from_bits(lanes[lane].a[word] & 0xffffe000);
    for (int word = 0; word < 2; ++word) b[4 * word + t][g] = from_bits(lanes[lane].b[word] & 0xffffe000);
  }
  add_product<8>(lanes, a, b);
}

}  // namespace emulator

#define threadIdx (emulator::machine.running->thread)
#define blockIdx (emulator::machine.running->block)
#define blockDim (emulator::machine.running->threads)
#define gridDim (emulator::machine.running->blocks)

inline void __syncthreads() {
  emulator::machine.meet_block();
}
inline void __syncwarp() {
  emulator::machine.meet_warp();
}
inline unsigned char* shared_memory() {
  return emulator::machine.running->in->shared;
}
inline void cluster_sync() {
  emulator::machine.meet_cluster();
}

template <class T>
const T* in_block(const T* mine, int block) {
  emulator::Block& here = *emulator::machine.running->in;
  const ptrdiff_t offset = reinterpret_cast<const unsigned char*>(mine) - here.shared;
  return reinterpret_cast<const T*>((*here.cluster)[block].shared + offset);
}

inline void grid_sync(unsigned* arrivals, unsigned target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    ++*arrivals;
    emulator::machine.spin(arrivals, target);
  }
  __syncthreads();
}

inline void prefetch(const void*) {}

inline void mma_bf16(float (&low)[2], float (&high)[2], const uint32_t (&a)[4], const uint32_t* b) {
  emulator::machine.multiply("bf16", {low, high, a, b}, emulator::multiply_16bit<emulator::from_bf16>);
}
inline void mma_fp16(float (&low)[2], float (&high)[2], const uint32_t (&a)[4], const uint32_t* b) {
  emulator::machine.multiply("fp16", {low, high, a, b}, emulator::multiply_16bit<emulator::from_fp16>);
}
inline void mma_tf32(float (&low)[2], float (&high)[2], const uint32_t (&a)[4], const uint32_t* b) {
  emulator::machine.multiply("tf32", {low, high, a, b}, emulator::multiply_tf32);
}

inline float round_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? x : emulator::from_bits((bits + 0x1000) & 0xffffe000);
}

// Room for two groups at a time, so that a few tiles of sequences already take turns.
class Device {
 public:
  int shared;
  bool clusters;

  explicit Device(int) {
    const std::string name = emulator::device_name();
    clusters = name == "sm_90";
    shared = name == "sm_90" ? 227 << 10 : name == "sm_80" ? 163 << 10 : 99 << 10;
  }

  template <class Arguments, class Shape>
  int resident_groups(void (*)(Arguments), const Shape&, int) const {
    return 2;
  }

  template <class Arguments, class Shape>
  void launch(void (*kernel)(Arguments), const Shape& shape, const Arguments& arguments) const {
    if (const char* log = std::getenv("AUFAST_EMULATED_LOG"))
      std::ofstream(log, std::ios::app)
          << shape.blocks << ' ' << shape.cluster << ' ' << shape.threads << ' ' << shape.shared << '\n';
    const int together = shape.cluster > 0 ? shape.cluster : shape.blocks;
    for (int first = 0; first < shape.blocks; first += together)
      emulator::machine.run(first, together, shape.blocks, shape.threads, shape.shared,
                            [&] { kernel(arguments); });
  }
};
