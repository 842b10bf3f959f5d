// out[row, head, :] = softmax(q * K^T / sqrt(head_dim)) * V over the positions that the row sees, from the paged cache.
//
//   qkv       [rows][q heads | k heads | v heads][head_dim]  f32, of which q is read
//   cache     [blocks][kv heads]                             K [head_dim][16] and V [16][head_dim], f32
//   tokens    [rows] positions, [rows] tables                u32
//   table, start [tables + 1], first [tables]                u32, as in positions.cu
//   chunk                                                    the row sees its chunk of so many positions; 0: all
//   out       [rows][heads][head_dim]                        f32
//
// Launch:  4 warps per block, one per (row, query head); head_dim at most 256.
// Order:   softmax on line over blocks of 16 absolute positions. A half of the warp makes the 16 scores of a block,
//          each one chain over the dimensions, so two blocks are worked on at once; maxima, sums (a fixed tree over
//          the block) and values are taken one block after the other.
// Bound:   memory: the cache of the visible positions. The reference profile: heads of a group read it each.
// Twin:    attention::attend_f32; equal bit for bit.

constexpr int kHeads = 4;
constexpr int kBlock = 16;
constexpr int kPartsMax = 256 / kWarp;

struct Shape {
  int heads, kv_heads, head_dim;
};

// Positions first..=last are visible.
struct Visible {
  u32 first, last;
};

// Score of the position of this lane in a block, or -inf where it is not visible.
HERD_INLINE float score(const float* q, const float* keys, int head_dim, u32 block, Visible visible, float scale) {
  const int slot = lane_id() % kBlock;
  const u32 position = block * kBlock + slot;
  if (position < visible.first || position > visible.last) return minus_infinity();
  float sum = 0.0f;
  for (int i = 0; i < head_dim; i++) sum = fmaf(q[i], keys[i * kBlock + slot], sum);
  return sum * scale;
}

// Largest of 16 neighbouring lanes and `floor`.
HERD_INLINE float max_16(float x, float floor) {
  // NaN is passed over.
  x = x > floor ? x : floor;
  for (int width = kBlock / 2; width > 0; width /= 2) {
    const float other = __shfl_xor_sync(kAll, x, width);
    x = other > x ? other : x;
  }
  return x;
}

// out = out * shrink + p * V for the visible positions of a block; `p` lies in the lanes from `lane` on.
HERD_INLINE void add_values(float (&out)[kPartsMax], float p, int lane, float shrink, const float* values, int head_dim,
                            u32 block, Visible visible) {
  for (int part = 0; part < kPartsMax; part++) out[part] *= shrink;
  const u32 start = block * kBlock;
  const int from = visible.first > start ? int(visible.first - start) : 0;
  const int to = int(min(visible.last - start + 1, u32(kBlock)));
  for (int slot = from; slot < to; slot++) {
    const float weight = __shfl_sync(kAll, p, lane + slot);
    const float* value = values + slot * head_dim;
    for (int part = 0; part < kPartsMax; part++) {
      const int i = part * kWarp + lane_id();
      if (i < head_dim) out[part] = fmaf(weight, value[i], out[part]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(128) herd_attention_f32(const float* qkv, int rows, int heads, int kv_heads,
                                                                     int head_dim, const float* cache,
                                                                     const u32* positions, const u32* tables,
                                                                     const u32* blocks, const u32* start,
                                                                     const u32* first, u32 chunk, float* out) {
  const int job = int(blockIdx.x) * kHeads + warp_id();
  if (job >= rows * heads) return;
  const int row = job / heads, head = job % heads, d = head_dim;
  const float* q = qkv + (size_t(row) * (heads + 2 * kv_heads) + head) * d;
  const u32 position = positions[row], table = tables[row];
  const Visible visible = {chunk == 0 ? 0 : position / chunk * chunk, position};
  blocks += start[table];
  const u32 table_first = first == nullptr ? 0 : first[table];
  const size_t kv_head = head / (heads / kv_heads);
  auto keys_of = [&](u32 block) {
    return cache + (size_t(blocks[block - table_first]) * kv_heads + kv_head) * 2 * kBlock * d;
  };

  const float scale = 1.0f / sqrtf(float(d));
  const int half = lane_id() / kBlock;
  const u32 last_block = visible.last / kBlock;
  float sum = 0.0f, max = minus_infinity();
  float mixed[kPartsMax] = {};
  for (u32 block = visible.first / kBlock; block <= last_block; block += 2) {
    const bool two = block < last_block;
    const u32 mine = two ? block + half : block;
    const float s = score(q, keys_of(mine), d, mine, visible, scale);
    const float largest = max_16(s, max);
    const float max_0 = __shfl_sync(kAll, largest, 0);
    const float largest_1 = __shfl_sync(kAll, largest, kBlock);
    const float max_1 = largest_1 > max_0 ? largest_1 : max_0;
    const float p = exp_fixed(s - (half == 0 ? max_0 : max_1));
    const float total = sum_16(p);

    const float shrink_0 = exp_fixed(max - max_0), total_0 = __shfl_sync(kAll, total, 0);
    sum = fmaf(sum, shrink_0, total_0);
    add_values(mixed, p, 0, shrink_0, keys_of(block) + kBlock * d, d, block, visible);
    const float shrink_1 = exp_fixed(max_0 - max_1), total_1 = __shfl_sync(kAll, total, kBlock);
    if (two) {
      sum = fmaf(sum, shrink_1, total_1);
      add_values(mixed, p, kBlock, shrink_1, keys_of(block + 1) + kBlock * d, d, block + 1, visible);
    }
    max = max_1;
  }
  const float norm = 1.0f / sum;
  out += size_t(job) * d;
  for (int part = 0; part < kPartsMax; part++) {
    const int i = part * kWarp + lane_id();
    if (i < d) out[i] = mixed[part] * norm;
  }
}
