// Kernels with a fault each that the watch over races must find, and some without one.
#include "emulator.hpp"

namespace {

constexpr int kThreads = 64;

// The block's own part of the memory.
u32* part(u32* out) { return out + blockIdx.x * 4096; }

// Every thread reads what its neighbour in the block has written.
__global__ void barrier_missing(u32* all) {
  u32* const out = part(all);
  __shared__ u32 words[kThreads];
  words[threadIdx.x] = 0;
  __syncthreads();
  words[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = words[(threadIdx.x + 1) % kThreads];
}

__global__ void barrier_there(u32* all) {
  u32* const out = part(all);
  __shared__ u32 words[kThreads];
  words[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = words[(threadIdx.x + 1) % kThreads];
}

// A shuffle makes lanes meet, and orders no memory.
__global__ void shuffle_for_barrier(u32* all) {
  u32* const out = part(all);
  __shared__ u32 words[kThreads];
  words[threadIdx.x] = threadIdx.x;
  const u32 own = __shfl_sync(0xffffffffu, threadIdx.x, emulator::lane());
  out[threadIdx.x] = own + words[threadIdx.x ^ 1];
}

__global__ void warp_barrier_there(u32* all) {
  u32* const out = part(all);
  __shared__ u32 words[kThreads];
  words[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = words[threadIdx.x ^ 1];
}

// A barrier of the warp where the block's is wanted.
__global__ void warp_barrier_for_block(u32* all) {
  u32* const out = part(all);
  __shared__ u32 words[kThreads];
  words[threadIdx.x] = 0;
  __syncthreads();
  words[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = words[threadIdx.x ^ 32];
}

// All lanes read before one of them writes.
__global__ void overwritten_too_soon(u32* all) {
  u32* const out = part(all);
  __shared__ u32 word;
  if (threadIdx.x == 0) word = 1;
  __syncthreads();
  out[threadIdx.x] = word;
  if (threadIdx.x == 1) word = 2;
}

__global__ void blocks_share_a_word(u32* out) {
  if (threadIdx.x == 0) out[0] = blockIdx.x;
}

__global__ void blocks_share_an_atomic(u32* out) { atomicMax(out, threadIdx.x); }

__global__ void atomic_is_read_plainly(u32* out) {
  atomicMax(out, threadIdx.x);
  if (threadIdx.x == 5) out[1] = out[0];
}

// The next copy goes where the last one's bytes are still to be read, by the same thread.
__global__ void copy_into_a_slot_in_use(u32* all) {
  u32* const out = part(all);
  HERD_DYNAMIC_SHARED(ring);
  u8* const mine = ring + threadIdx.x * 16;
  copy_async(mine, out + threadIdx.x * 4, true);
  copy_commit();
  copy_wait<0>();
  copy_async(mine, out, true);
  copy_commit();
  out[1024 + threadIdx.x] = *reinterpret_cast<u32*>(mine);
  copy_wait<0>();
}

__global__ void copy_that_is_not_waited_for(u32* all) {
  u32* const out = part(all);
  HERD_DYNAMIC_SHARED(ring);
  u8* const mine = ring + threadIdx.x * 16;
  copy_async(mine, out + threadIdx.x * 4, true);
  copy_commit();
  out[1024 + threadIdx.x] = *reinterpret_cast<u32*>(mine);
}

// What is copied changes on its way.
__global__ void copy_of_what_changes(u32* all) {
  u32* const out = part(all);
  HERD_DYNAMIC_SHARED(ring);
  copy_async(ring + threadIdx.x * 16, out + threadIdx.x * 4, true);
  copy_commit();
  out[threadIdx.x * 4] = 1;
  copy_wait<0>();
}

__global__ void copy_well_done(u32* all) {
  u32* const out = part(all);
  HERD_DYNAMIC_SHARED(ring);
  u8* const mine = ring + threadIdx.x * 16;
  for (int i = 0; i < 2; i++) {
    copy_async(mine, out + threadIdx.x * 4, true);
    copy_commit();
    copy_wait<0>();
    out[1024 + threadIdx.x] = *reinterpret_cast<u32*>(mine);
  }
}

__global__ void constant_that_changes(u32* all) {
  u32* const out = part(all);
  out[threadIdx.x] = 1;
  out[1024 + threadIdx.x] = __ldg(out + threadIdx.x);
}

__global__ void address_not_aligned(u32* out) { *reinterpret_cast<u64*>(out + 1) = 1; }

__global__ void shared_memory_not_written(u32* out) {
  __shared__ u32 words[kThreads];
  if (blockIdx.x == 0) words[threadIdx.x] = 1;
  out[blockIdx.x * kThreads + threadIdx.x] = words[threadIdx.x];
}

__global__ void memory_of_the_host(u32* out) {
  const u32* const host = static_cast<u32*>(std::calloc(1, 4096));
  out[threadIdx.x] = host[threadIdx.x];
}

#define PLANTED(name) static emulator::Entry<&name> entry_##name(#name);
PLANTED(barrier_missing)
PLANTED(barrier_there)
PLANTED(shuffle_for_barrier)
PLANTED(warp_barrier_there)
PLANTED(warp_barrier_for_block)
PLANTED(overwritten_too_soon)
PLANTED(blocks_share_a_word)
PLANTED(blocks_share_an_atomic)
PLANTED(atomic_is_read_plainly)
PLANTED(copy_into_a_slot_in_use)
PLANTED(copy_that_is_not_waited_for)
PLANTED(copy_of_what_changes)
PLANTED(copy_well_done)
PLANTED(constant_that_changes)
PLANTED(address_not_aligned)
PLANTED(shared_memory_not_written)
PLANTED(memory_of_the_host)

}  // namespace
