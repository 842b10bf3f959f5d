// Reads memory as fast as it can be read: the bound of a step that reads weights.
//
//   from  [count]  of 16 bytes
//   sums  [blocks of the grid]  u32: sum of all words that a block has read, so that none is left out
//
// Launch:  blocks of 256 threads, several per multiprocessor; each strides over all of the memory.
// Bound:   memory, by definition.
// Twin:    a sum, in a test.

constexpr int kThreads = 256;
// Loads of a thread that are under way at once.
constexpr int kAhead = 8;

extern "C" __global__ void __launch_bounds__(256) herd_read(const uint4* from, u64 count, u32* sums) {
  __shared__ u32 of_warp[kThreads / kWarp];
  const u64 stride = u64(gridDim.x) * kThreads;
  u32 sum = 0;
  for (u64 at = u64(blockIdx.x) * kThreads + threadIdx.x; at < count; at += stride * kAhead) {
    uint4 words[kAhead];
    for (int i = 0; i < kAhead; i++) {
      words[i] = at + stride * i < count ? load_once(from + at + stride * i) : uint4{0, 0, 0, 0};
    }
    for (int i = 0; i < kAhead; i++) sum += words[i].x + words[i].y + words[i].z + words[i].w;
  }
  for (int width = kWarp / 2; width > 0; width /= 2) sum += __shfl_xor_sync(kAll, sum, width);
  if (lane_id() == 0) of_warp[warp_id()] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / kWarp; warp++) sum += of_warp[warp];
  sums[blockIdx.x] = sum;
}
