// Runs CUDA kernels on a CPU, one block after the other, every thread of a block as a fiber. For tests of index
// arithmetic and of the host's side; it knows nothing of speed, and little of memory order: a fiber runs until it
// waits, so a missing barrier may go unnoticed, unless it is compiled to look for races (races.cpp). What it always
// notices: collectives that not all lanes of a warp reach, barriers that not all threads reach, dynamic shared memory
// that is read before it is written (it is poisoned per block), and, with the guard pages of the allocator, accesses
// past the end of a buffer.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#define HERD_EMULATED 1

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = unsigned long long;
using i32 = int32_t;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Blocks run one after the other, so one copy will do.
#define __shared__ static
#define HERD_DYNAMIC_SHARED(name) u8* name = emulator::dynamic_shared()
#define HERD_INLINE inline

// What touches memory unlike a kernel's plain code, and says so itself where races are looked for.
#ifdef HERD_RACES
#define HERD_UNWATCHED __attribute__((no_sanitize("thread"), noinline))
#else
#define HERD_UNWATCHED
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace emulator {

struct Thread {
  dim3 thread, block, block_size, grid_size;
};
extern Thread current;

u8* dynamic_shared();
// Waits for all threads of the block.
void wait_block();
// Waits for all lanes of the warp; returns what they brought, by lane. That orders no memory.
const u64* exchange(u32 mask, u64 value, int line);
// Waits for all lanes of the warp, and orders what they have done to memory.
void wait_warp(int line);
#ifdef HERD_RACES
// Memory that a device has, and that it has no more: kernels touch no other.
void own(u64 first, u64 bytes);
void disown(u64 first);
#else
inline void own(u64, u64) {}
inline void disown(u64) {}
#endif
// The fiber cannot go on: says so and ends the process.
[[noreturn]] void fail(const char* what);

using Body = void (*)(void** args);
// A kernel: what runs it, and the bytes of each parameter.
struct Kernel {
  Body body;
  std::vector<u32> parameters;
};
void add(const char* name, Kernel kernel);
// Null if there is none.
const Kernel* find(const std::string& name);

template <class... Args, std::size_t... Index>
HERD_UNWATCHED void call(void (*kernel)(Args...), void** args, std::index_sequence<Index...>) {
  kernel(*static_cast<Args*>(args[Index])...);
}

template <auto kernel>
struct Entry;
template <class... Args, void (*kernel)(Args...)>
struct Entry<kernel> {
  HERD_UNWATCHED static void run(void** args) { call(kernel, args, std::index_sequence_for<Args...>{}); }
  explicit Entry(const char* name) { add(name, {&run, {u32(sizeof(Args))...}}); }
};

template <class T>
u64 bits(T x) {
  static_assert(sizeof(T) <= 8);
  u64 bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T>
T value(u64 bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

HERD_UNWATCHED inline int lane() { return int(current.thread.x % 32); }

enum class Access { Read, Write, Atomic, Constant };
// Somebody touches memory, at a place in the code; only where races are looked for.
#ifdef HERD_RACES
void note(Access access, const void* at, std::size_t bytes, const void* code = __builtin_return_address(0));
#else
inline void note(Access, const void*, std::size_t, const void* = nullptr) {}
#endif

}  // namespace emulator

#define threadIdx (emulator::current.thread)
#define blockIdx (emulator::current.block)
#define blockDim (emulator::current.block_size)
#define gridDim (emulator::current.grid_size)

#define __syncthreads() emulator::wait_block()
#define __syncwarp() emulator::wait_warp(__LINE__)
#define __threadfence() ((void)0)

template <class T>
HERD_UNWATCHED T herd_shfl(u32 mask, T x, int from, int line) {
  return emulator::value<T>(emulator::exchange(mask, emulator::bits(x), line)[from & 31]);
}
#define __shfl_sync(mask, x, from) herd_shfl(mask, x, from, __LINE__)
#define __shfl_xor_sync(mask, x, with) herd_shfl(mask, x, emulator::lane() ^ (with), __LINE__)
template <class T>
T herd_shfl_by(u32 mask, T x, int by, int line) {
  const int from = emulator::lane() + by;
  return herd_shfl(mask, x, from < 0 || 31 < from ? emulator::lane() : from, line);
}
#define __shfl_down_sync(mask, x, by) herd_shfl_by(mask, x, by, __LINE__)
#define __shfl_up_sync(mask, x, by) herd_shfl_by(mask, x, -(by), __LINE__)
HERD_UNWATCHED inline u32 herd_ballot(u32 mask, bool is, int line) {
  const u64* all = emulator::exchange(mask, is, line);
  u32 votes = 0;
  for (int i = 0; i < 32; i++) votes |= u32(all[i] != 0) << i;
  return votes;
}
#define __ballot_sync(mask, is) herd_ballot(mask, is, __LINE__)
#define __any_sync(mask, is) (herd_ballot(mask, is, __LINE__) != 0)
#define __all_sync(mask, is) (herd_ballot(mask, is, __LINE__) == 0xffffffffu)

inline u32 __float_as_uint(float x) { return emulator::value<u32>(emulator::bits(x)); }
inline float __uint_as_float(u32 x) { return emulator::value<float>(emulator::bits(x)); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __ffs(u32 x) { return __builtin_ffs(int(x)); }
inline u32 __umulhi(u32 a, u32 b) { return u32(u64(a) * b >> 32); }
template <class T>
HERD_UNWATCHED T __ldg(const T* from) {
  emulator::note(emulator::Access::Constant, from, sizeof(T));
  return *from;
}
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
HERD_UNWATCHED T herd_atomic(T* at, T other, bool larger) {
  emulator::note(emulator::Access::Atomic, at, sizeof(T));
  const T old = *at;
  *at = larger ? max(old, other) : min(old, other);
  return old;
}
#define atomicMin(at, x) herd_atomic(at, x, false)
#define atomicMax(at, x) herd_atomic(at, x, true)
template <class T>
HERD_UNWATCHED T atomicAdd(T* at, T x) {
  emulator::note(emulator::Access::Atomic, at, sizeof(T));
  const T old = *at;
  *at += x;
  return old;
}

// The tensor cores' product. Within one call the true hardware's order of additions is not documented; here it
// is that of k. d: lane 4 * g + t holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
void herd_mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, int line);
#define mma_bf16(d, a, b0, b1) herd_mma(d, a, b0, b1, __LINE__)

HERD_UNWATCHED inline uint4 load_once(const void* from) {
  emulator::note(emulator::Access::Constant, from, sizeof(uint4));
  return *static_cast<const uint4*>(from);
}

// Copies happen when they are waited for, so that what is read too early is poison.
void copy_async(void* to, const void* from, bool is_there);
void copy_commit();
void herd_copy_wait(int groups);
template <int kGroups>
void copy_wait() {
  herd_copy_wait(kGroups);
}

inline float herd_bf16(u32 bits) { return __uint_as_float(bits << 16); }
inline u32 herd_round(float x) {
  const u32 bits = __float_as_uint(x);
  return (x != x ? bits | 0x00400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline u32 mul_bf16x2(u32 a, u32 b) {
  const u32 low = herd_round(herd_bf16(a & 0xffffu) * herd_bf16(b & 0xffffu));
  return low | herd_round(herd_bf16(a >> 16) * herd_bf16(b >> 16)) << 16;
}
