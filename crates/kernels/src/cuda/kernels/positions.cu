// Positions into q and k of every row, keys and values into the cache.
//
//   qkv       [rows][q heads | k heads | v heads][head_dim]  f32; q is overwritten
//   angles    [rows][head_dim / 2][cos, sin]                 f32; null: no rotary embedding
//   factors   [rows]                                         f32, of q where there are no angles; null: 1
//   eps                                                      of the QK norm, which follows the rotation; negative: none
//   tokens    [rows] positions, [rows] tables                u32
//   table, start [tables + 1], first [tables]                u32; table t is table[start[t]..start[t + 1]], its entry 0
//             covers block number first[t]; first is null: 0
//   cache     [blocks][kv heads]                             as `cache.cuh` says
//
// Launch:  grid (rows, ceil((heads + 2 * kv heads) / 4)), one warp per head; 4 * head_dim floats of shared memory.
// Order:   pairs (2j, 2j + 1) rotate; squares are summed in 16 interleaved chains and a fixed tree.
// Rounding: with a bf16 cache, q is rounded to bf16, too.
// Bound:   memory, 8 B per element; latency at few rows.
// Twin:    rope::{rotate, scale}, Cache::write; equal bit for bit.

constexpr int kHeads = 4;
constexpr int kChains = 16;

struct Shape {
  int heads, kv_heads, head_dim;
};

// Where a row's position lies in the cache: index of its block, and its place therein.
struct Place {
  u32 block;
  int slot;
};

HERD_INLINE Place place_of(u32 position, u32 table, const u32* blocks, const u32* start, const u32* first) {
  const u32 number = position / kBlock - (first == nullptr ? 0 : first[table]);
  return Place{blocks[start[table] + number], int(position % kBlock)};
}

// The head's elements to `to`, rotated. Then the warp waits.
HERD_INLINE void rotate(const float* head, const float* angles, int head_dim, float* to) {
  for (int j = lane_id(); j < head_dim / 2; j += kWarp) {
    const float re = head[2 * j], im = head[2 * j + 1], cosine = angles[2 * j], sine = angles[2 * j + 1];
    to[2 * j] = fmaf(re, cosine, -(im * sine));
    to[2 * j + 1] = fmaf(re, sine, im * cosine);
  }
  __syncwarp();
}

// 1 / rms of a head; every lane has it.
HERD_INLINE float norm_factor(const float* head, int head_dim, float eps) {
  float sum = 0.0f;
  // Both halves of the warp do the same.
  for (int i = lane_id() % kChains; i < head_dim; i += kChains) sum = fmaf(head[i], head[i], sum);
  return 1.0f / sqrtf(sum_16(sum) / float(head_dim) + eps);
}

template <class T>
HERD_INLINE void positions_row(float* qkv, Shape shape, const float* angles, const float* factors, float eps,
                               const u32* positions, const u32* tables, const u32* blocks, const u32* start,
                               const u32* first, T* cache) {
  HERD_DYNAMIC_SHARED(bytes);
  const int row = int(blockIdx.x), d = shape.head_dim;
  const int head = int(blockIdx.y) * kHeads + warp_id(), all = shape.heads + 2 * shape.kv_heads;
  if (head >= all) return;
  float* values = qkv + (size_t(row) * all + head) * d;
  float* rotated = reinterpret_cast<float*>(bytes) + warp_id() * d;
  const bool is_query = head < shape.heads, is_key = !is_query && head < shape.heads + shape.kv_heads;

  const float* from = values;
  float factor = is_query && factors != nullptr ? factors[row] : 1.0f;
  if (angles != nullptr && (is_query || is_key)) {
    rotate(values, angles + size_t(row) * d, d, rotated);
    from = rotated;
    if (!(eps < 0.0f)) factor = norm_factor(rotated, d, eps);
  }
  if (is_query) {
    for (int i = lane_id(); i < d; i += kWarp) {
      T rounded;
      narrow(from[i] * factor, &rounded);
      values[i] = widen(rounded);
    }
    return;
  }
  const Place place = place_of(positions[row], tables[row], blocks, start, first);
  const int kv_head = (head - shape.heads) % shape.kv_heads;
  T* keys = cache + (size_t(place.block) * shape.kv_heads + kv_head) * 2 * kBlock * d;
  T* to = is_key ? keys : keys + kBlock * d;
  for (int i = lane_id(); i < d; i += kWarp) {
    const size_t at = is_key ? key_at(keys, place.slot, i, d) : value_at(keys, place.slot, i, d);
    narrow(from[i] * factor, &to[at]);
  }
}

extern "C" __global__ void herd_positions_f32(float* qkv, int heads, int kv_heads, int head_dim, const float* angles,
                                              const float* factors, float eps, const u32* positions, const u32* tables,
                                              const u32* blocks, const u32* start, const u32* first, float* cache) {
  positions_row(qkv, Shape{heads, kv_heads, head_dim}, angles, factors, eps, positions, tables, blocks, start, first,
                cache);
}

extern "C" __global__ void herd_positions_bf16(float* qkv, int heads, int kv_heads, int head_dim, const float* angles,
                                               const float* factors, float eps, const u32* positions, const u32* tables,
                                               const u32* blocks, const u32* start, const u32* first, bf16* cache) {
  positions_row(qkv, Shape{heads, kv_heads, head_dim}, angles, factors, eps, positions, tables, blocks, start, first,
                cache);
}
