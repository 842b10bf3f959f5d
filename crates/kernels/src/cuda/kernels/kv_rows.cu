// Keys and values of positions out of the KV cache of all layers of a pool, as they travel to another worker, and back.
//
//   layers  [layers]                                      where each has its cache:
//           [blocks][kv heads]                            f32 or bf16, as `cache.cuh` says
//   places  [positions]                                   u32: 16 times the block, plus the place therein
//   rows    [positions][layers][K, V][kv heads][head_dim] elements of the cache
//
// Launch:  grid (positions, layers), 256 threads.
// Bound:   memory: of every 16 neighbours in the cache one is wanted, where a head's positions are neighbours.
// Twin:    Cache::{read_rows, write_rows}; equal bit for bit.

// Calls `move(place in the layer's cache, place in rows)` for this thread's elements of a position.
template <class T, class Move>
HERD_INLINE void each_element(const T* cache, const u32* places, int kv_heads, int head_dim, Move move) {
  const u32 place = places[blockIdx.x];
  const size_t block = place / kBlock;
  const int slot = int(place % kBlock), half = kv_heads * head_dim;
  const size_t row = (size_t(blockIdx.x) * gridDim.y + blockIdx.y) * 2 * half;
  for (int i = int(threadIdx.x); i < 2 * half; i += int(blockDim.x)) {
    const int is_value = i / half, head = i / head_dim % kv_heads, dim = i % head_dim;
    const size_t base = ((block * kv_heads + head) * 2 + is_value) * kBlock * head_dim;
    const size_t at = is_value ? value_at(cache, slot, dim, head_dim) : key_at(cache, slot, dim, head_dim);
    move(base + at, row + i);
  }
}

template <class T>
HERD_INLINE void gather(const T* const* layers, const u32* places, T* rows, int kv_heads, int head_dim) {
  const T* cache = layers[blockIdx.y];
  each_element(cache, places, kv_heads, head_dim, [&](size_t from, size_t to) { rows[to] = cache[from]; });
}

template <class T>
HERD_INLINE void scatter(T* const* layers, const u32* places, const T* rows, int kv_heads, int head_dim) {
  T* cache = layers[blockIdx.y];
  each_element(cache, places, kv_heads, head_dim, [&](size_t to, size_t from) { cache[to] = rows[from]; });
}

extern "C" __global__ void herd_kv_gather_f32(const float* const* layers, const u32* places, float* rows, int kv_heads,
                                              int head_dim) {
  gather(layers, places, rows, kv_heads, head_dim);
}

extern "C" __global__ void herd_kv_gather_bf16(const bf16* const* layers, const u32* places, bf16* rows, int kv_heads,
                                               int head_dim) {
  gather(layers, places, rows, kv_heads, head_dim);
}

extern "C" __global__ void herd_kv_scatter_f32(float* const* layers, const u32* places, const float* rows, int kv_heads,
                                               int head_dim) {
  scatter(layers, places, rows, kv_heads, head_dim);
}

extern "C" __global__ void herd_kv_scatter_bf16(bf16* const* layers, const u32* places, const bf16* rows, int kv_heads,
                                                int head_dim) {
  scatter(layers, places, rows, kv_heads, head_dim);
}
