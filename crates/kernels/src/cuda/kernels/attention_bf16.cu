// Attention of the rows of a step over the paged cache, grouped-query, causal, over all positions or within chunks.
//
//   qkv          [rows, q | k | v]  f32; queries are rotated and rounded to bf16
//   cache        [blocks][kv_heads] of K [16][dim], then V [dim][16], bf16
//   position     [rows]             u32
//   table        [rows]             u32: which block table
//   blocks       u32; those of table t from blocks_start[t] on, where block number blocks_first[t] (0 if null) is first
//   chunk        positions before the query's own chunk of so many are not seen; 0: all are
//   items        rows of one table and a range of blocks; made by the host (`attention_bf16.rs`)
//   partials     [heads][2 + dim]   f32 per row and split: largest score, sum of weights, weighted sum of values
//   out          [rows, q]          bf16
//
// Launch:  herd_attention_split_*: x: items, y: kv heads; one warp. An item is up to 16 / group rows and one split.
//          herd_attention_whole_*:  the same with four warps, each up to 16 / group rows, that share keys and values.
//          herd_attention_combine:  x: rows that were split, y: heads; dim threads rounded up to whole warps.
//          Which rows are split changes no bit.
// Order:   splits are 256 absolute positions. In a split, blocks of 16 absolute positions one after the other, with a
//          running maximum; weights are rounded to bf16. Then splits one after the other. A block or split of which a
//          row sees nothing leaves its bits as they are: it is scaled by exactly 1, and exactly 0 is added.
// Bound:   split: memory. A warp has 16 KiB on their way and takes some 600 instructions per 8 KiB block of keys and
//          values, 0.4 of what 8 warps of an SM could issue at an H200's share of the memory. Whole: exponentials and
//          tensor cores in about equal parts; keys and values come from the L2 cache once per 12 rows of a group of 5.
// Twin:    attention::attend_bf16, which does not round the weights and has no splits.

constexpr int kBlock = 16;        // positions of a block of the cache
constexpr int kSplitBlocks = 16;  // blocks of a split
constexpr int kPiece = 512;       // bytes: 16 per lane
constexpr int kStages = 3;

struct Item {
  u32 row, rows;    // first row, and how many
  u32 first, last;  // numbers of the blocks to look at
};

struct Cache {
  const bf16* memory;
  const u32* position;
  const u32* table;
  const u32* blocks;
  const u32* blocks_start;
  const u32* blocks_first;
  u32 chunk;
};

struct Heads {
  int group, kv_heads, dim;
};

// Of a row that was split: where its partials are.
struct SplitRow {
  u32 row, first, count;
};

HERD_INLINE float none() { return __uint_as_float(0xff800000u); }

// What is subtracted from scores: their maximum, unless there is none yet.
HERD_INLINE float base_of(float max) { return max == none() ? 0.0f : max; }

HERD_INLINE float larger(float a, float b) { return a > b ? a : b; }

// Over the four lanes that share rows of a product.
HERD_INLINE float max_4(float x) {
  x = larger(x, __shfl_xor_sync(kAll, x, 1));
  return larger(x, __shfl_xor_sync(kAll, x, 2));
}

HERD_INLINE float sum_4(float x) {
  x += __shfl_xor_sync(kAll, x, 1);
  return x + __shfl_xor_sync(kAll, x, 2);
}

// Weights of one split join those of earlier ones.
struct Joined {
  float max, sum, keep, add;

  HERD_INLINE void join(float split_max, float split_sum) {
    const float both = larger(max, split_max);
    keep = exp_fixed(max - base_of(both));
    add = exp_fixed(split_max - base_of(both));
    sum = fmaf(split_sum, add, sum * keep);
    max = both;
  }

  HERD_INLINE float value(float before, float of_split) const { return fmaf(of_split, add, before * keep); }

  // + 0 makes a zero positive, as a split without weight would.
  HERD_INLINE bf16 result(float value) const { return to_bf16(value * (1.0f / sum) + 0.0f); }
};

// One of the two query vectors whose scores a lane holds: rows `lane / 4` and 8 more of a product.
struct Query {
  bool is_there;
  u32 row;
  int head;
  u32 first, last;  // positions that it sees; all if it is not there: nobody looks at its result

  HERD_INLINE bool sees(u32 at) const { return first <= at && at <= last; }
};

HERD_INLINE Query query_of(const Item& item, const Cache& cache, const Heads& heads, int vector) {
  const int rows = kBlock / heads.group, row = vector / heads.group;
  Query query;
  query.row = item.row + warp_id() * rows + row;
  query.is_there = row < rows && query.row < item.row + item.rows;
  query.head = int(blockIdx.y) * heads.group + vector % heads.group;
  query.last = query.is_there ? cache.position[query.row] : 0xffffffffu;
  query.first = !query.is_there || cache.chunk == 0 ? 0 : query.last / cache.chunk * cache.chunk;
  return query;
}

template <int kDim, int kWarps>
struct Attention {
  static constexpr int kKeyPieces = kDim / 16, kPieces = 2 * kKeyPieces;
  static constexpr int kStage = kPieces * kPiece;
  static constexpr int kTiles = kDim / 8;

  u32 left[kDim / 16][4];  // queries
  float out[kTiles][4];
  float max[2], sum[2];  // of the two queries; the sum is this lane's part
  u32 ids;               // block `window + lane` of the cache

  // Lane 4 g + t takes 8 dimensions from 32 c + 8 t: the order of dimensions within 32 is that of `copy`.
  HERD_INLINE void load_queries(const float* qkv, const Query (&query)[2], const Heads& heads) {
    const int columns = (heads.group + 2) * heads.kv_heads * heads.dim;
#pragma unroll
    for (int c = 0; c < kDim / 32; c++) {
      const int dim = 32 * c + lane_id() % 4 * 8;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        u32 words[4] = {};
        if (query[i].is_there && dim < heads.dim) {
          const float* from = qkv + size_t(query[i].row) * columns + query[i].head * heads.dim + dim;
          const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
          words[0] = to_bf16x2(low.x, low.y), words[1] = to_bf16x2(low.z, low.w);
          words[2] = to_bf16x2(high.x, high.y), words[3] = to_bf16x2(high.z, high.w);
        }
        left[2 * c][i] = words[0], left[2 * c][i + 2] = words[1];
        left[2 * c + 1][i] = words[2], left[2 * c + 1][i + 2] = words[3];
      }
    }
  }

  // Starts to copy a block: keys in the order of the right operand, values as they are.
  HERD_INLINE void copy(u8* stage, const Item& item, const Cache& cache, const Heads& heads, u32 block) {
    if ((block - item.first) % kWarp == 0) {
      const u32 table = cache.table[item.row];
      const u32 skipped = cache.blocks_first == nullptr ? 0 : cache.blocks_first[table];
      const u32 mine = min(block + lane_id(), item.last);
      ids = cache.blocks[cache.blocks_start[table] + mine - skipped];
    }
    const u32 id = __shfl_sync(kAll, ids, int((block - item.first) % kWarp));
    const bf16* keys = cache.memory + (size_t(id) * heads.kv_heads + blockIdx.y) * (2 * kBlock) * heads.dim;
    const int lane = lane_id(), group = lane / 4, warp = kWarps == 1 ? 0 : warp_id();
    // Columns 2 t and 2 t + 1 of both tiles of scores are positions 4 t to 4 t + 3: as the values have them.
    const bf16* const my_keys = keys + (group / 2 * 4 + group % 2) * heads.dim + lane % 4 * 8;
    const bf16* const my_values = keys + kBlock * heads.dim + lane * 8;
#pragma unroll
    for (int i = 0; i < kPieces / kWarps; i++) {
      const int piece = i * kWarps + warp, value = piece - kKeyPieces;
      u8* const to = stage + piece * kPiece + lane * 16;
      if (kKeyPieces % kWarps == 0 ? i < kKeyPieces / kWarps : value < 0) {
        const bf16* from = my_keys + piece % 2 * 2 * heads.dim + piece / 2 * 32;
        copy_async(to, from, piece / 2 * 32 + lane % 4 * 8 < heads.dim);
      } else {
        copy_async(to, my_values + value * 256, value * 16 + lane / 2 < heads.dim);
      }
    }
  }

  // What no row of the item sees may be anything, and 0 times anything need not be 0: bits to keep of a lane's values.
  static HERD_INLINE uint2 seen_bits(u32 at, u32 seen_first, u32 seen_last) {
    u32 keep[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 position = at + lane_id() % 4 * 4 + j;
      keep[j] = seen_first <= position && position <= seen_last ? 0xffffu : 0;
    }
    return uint2{keep[0] | keep[1] << 16, keep[2] | keep[3] << 16};
  }

  // This lane's part of the right operand: positions 4 t to 4 t + 3 of dimension 8 n + g.
  static HERD_INLINE uint2 values_of(const u8* stage, int n) {
    return *reinterpret_cast<const uint2*>(stage + (kKeyPieces + n / 2) * kPiece + n % 2 * 256 + lane_id() * 8);
  }

  // `at`: the block's first position; the item's rows see positions from `seen_first` to `seen_last`.
  HERD_INLINE void add_block(const u8* stage, const Query (&query)[2], u32 at, u32 seen_first, u32 seen_last, float scale) {
    float score[2][4] = {};
#pragma unroll
    for (int c = 0; c < kDim / 32; c++) {
#pragma unroll
      for (int tile = 0; tile < 2; tile++) {
        const uint4 keys = load_16(stage + (2 * c + tile) * kPiece + lane_id() * 16);
        mma_bf16(score[tile], left[2 * c], keys.x, keys.y);
        mma_bf16(score[tile], left[2 * c + 1], keys.z, keys.w);
      }
    }
    const u32 mine = at + lane_id() % 4 * 4, end = at + kBlock - 1;
    const bool all = query[0].sees(at) && query[0].sees(end) && query[1].sees(at) && query[1].sees(end);
    const bool is_masked = __any_sync(kAll, !all);
    float shrink[2];
    u32 weight[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float s[4], largest = none();
#pragma unroll
      for (int j = 0; j < 4; j++) s[j] = score[j / 2][2 * i + j % 2] * scale;
      if (is_masked) {
#pragma unroll
        for (int j = 0; j < 4; j++) s[j] = query[i].sees(mine + j) ? s[j] : none();
      }
#pragma unroll
      for (int j = 0; j < 4; j++) largest = larger(largest, s[j]);
      largest = larger(max[i], max_4(largest));
      const float base = base_of(largest);
      shrink[i] = exp_fixed(max[i] - base);
      max[i] = largest;
      weight[i] = to_bf16x2(exp_fixed(s[0] - base), exp_fixed(s[1] - base));
      weight[i + 2] = to_bf16x2(exp_fixed(s[2] - base), exp_fixed(s[3] - base));
      sum[i] = fmaf(sum[i], shrink[i], sum_pair(weight[i]) + sum_pair(weight[i + 2]));
    }
    if (__any_sync(kAll, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        for (int i = 0; i < 4; i++) out[n][i] *= shrink[i / 2];
      }
    }
    if (at < seen_first || seen_last < end) {
      const uint2 keep = seen_bits(at, seen_first, seen_last);
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        const uint2 values = values_of(stage, n);
        mma_bf16(out[n], weight, values.x & keep.x, values.y & keep.y);
      }
      return;
    }
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      const uint2 values = values_of(stage, n);
      mma_bf16(out[n], weight, values.x, values.y);
    }
  }

  static HERD_INLINE float sum_pair(u32 pair) {
    return __uint_as_float(pair << 16) + __uint_as_float(pair & 0xffff0000u);
  }

  HERD_INLINE void begin_split() {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      for (int i = 0; i < 4; i++) out[n][i] = 0.0f;
    }
    for (int i = 0; i < 2; i++) {
      max[i] = none();
      sum[i] = 0.0f;
    }
  }

  // Goes through the item's blocks; `end_split(block)` is called at the last block of each split, when `out`, `max` and
  // the whole `sum` are those of the split.
  template <class EndSplit>
  HERD_INLINE void run(u8* ring, const Item& item, const Cache& cache, const Heads& heads, const Query (&query)[2],
                       EndSplit end_split) {
    // Rows of an item need not be in order.
    u32 seen_first = 0xffffffffu, seen_last = 0;
    for (u32 i = 0; i < item.rows; i++) {
      const u32 last = cache.position[item.row + i];
      seen_last = max_of(seen_last, last);
      seen_first = min(seen_first, cache.chunk == 0 ? 0u : last / cache.chunk * cache.chunk);
    }
    const float scale = 1.0f / sqrtf(float(heads.dim));
    begin_split();
#pragma unroll 1
    for (u32 i = 0; i < kStages - 1; i++) {
      if (item.first + i <= item.last) copy(ring + i * kStage, item, cache, heads, item.first + i);
      copy_commit();
    }
    int now = 0, free = kStages - 1;
#pragma unroll 1
    for (u32 block = item.first; block <= item.last; block++) {
      copy_wait<kStages - 2>();
      __syncthreads();
      const u32 next = block + kStages - 1;
      if (next <= item.last) copy(ring + free * kStage, item, cache, heads, next);
      copy_commit();
      const u32 at = block * kBlock;
      add_block(ring + now * kStage, query, at, seen_first, seen_last, scale);
      if (block == item.last || block % kSplitBlocks == kSplitBlocks - 1) {
        for (int i = 0; i < 2; i++) sum[i] = sum_4(sum[i]);
        end_split(block);
        begin_split();
      }
      now = now + 1 < kStages ? now + 1 : 0;
      free = free + 1 < kStages ? free + 1 : 0;
    }
    copy_wait<0>();
  }

  static HERD_INLINE u32 max_of(u32 a, u32 b) { return a < b ? b : a; }

  // The first of the two neighbouring dimensions that a lane has of a tile.
  static HERD_INLINE int dim_of(int tile) { return tile * 8 + lane_id() % 4 * 2; }
};

template <int kDim>
HERD_INLINE void attention_split(const float* qkv, const Item& item, const Cache& cache, const Heads& heads,
                                 const u32* partials_start, float* partials) {
  using Attention = Attention<kDim, 1>;
  // So many that the grid has a round size.
  if (item.rows == 0) return;
  __shared__ __align__(16) u8 ring[kStages * Attention::kStage];
  const Query query[2] = {query_of(item, cache, heads, lane_id() / 4), query_of(item, cache, heads, lane_id() / 4 + 8)};
  Attention attention;
  attention.load_queries(qkv, query, heads);
  attention.run(ring, item, cache, heads, query, [&](u32 block) {
    const u32 split = block / kSplitBlocks;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 first_split = query[i].first / (kBlock * kSplitBlocks), last_split = query[i].last / (kBlock * kSplitBlocks);
      if (!query[i].is_there || split < first_split || last_split < split) continue;
      const size_t index = partials_start[query[i].row] + (split - first_split);
      float* to = partials + (index * heads.group * heads.kv_heads + query[i].head) * (2 + heads.dim);
      if (lane_id() % 4 == 0) {
        to[0] = attention.max[i];
        to[1] = attention.sum[i];
      }
#pragma unroll
      for (int n = 0; n < Attention::kTiles; n++) {
        const int dim = Attention::dim_of(n);
        if (heads.dim <= dim) continue;
        *reinterpret_cast<float2*>(to + 2 + dim) = float2{attention.out[n][2 * i], attention.out[n][2 * i + 1]};
      }
    }
  });
}

template <int kDim>
HERD_INLINE void attention_whole(const float* qkv, const Item& item, const Cache& cache, const Heads& heads,
                                 bf16* result) {
  using Attention = Attention<kDim, 4>;
  __shared__ __align__(16) u8 ring[kStages * Attention::kStage];
  const Query query[2] = {query_of(item, cache, heads, lane_id() / 4), query_of(item, cache, heads, lane_id() / 4 + 8)};
  Attention attention;
  attention.load_queries(qkv, query, heads);
  Joined joined[2] = {{none(), 0.0f, 0.0f, 0.0f}, {none(), 0.0f, 0.0f, 0.0f}};
  float total[Attention::kTiles][4] = {};
  attention.run(ring, item, cache, heads, query, [&](u32) {
    for (int i = 0; i < 2; i++) joined[i].join(attention.max[i], attention.sum[i]);
#pragma unroll
    for (int n = 0; n < Attention::kTiles; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) total[n][i] = joined[i / 2].value(total[n][i], attention.out[n][i]);
    }
  });
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (!query[i].is_there) continue;
    bf16* const to = result + (size_t(query[i].row) * heads.group * heads.kv_heads + query[i].head) * heads.dim;
#pragma unroll
    for (int n = 0; n < Attention::kTiles; n++) {
      const int dim = Attention::dim_of(n);
      if (heads.dim <= dim) continue;
      to[dim] = joined[i].result(total[n][2 * i]);
      to[dim + 1] = joined[i].result(total[n][2 * i + 1]);
    }
  }
}

extern "C" __global__ void herd_attention_combine(const float* partials, const SplitRow* rows, int dim, bf16* out) {
  const SplitRow row = rows[blockIdx.x];
  const int at = int(threadIdx.x), heads = int(gridDim.y), head = int(blockIdx.y);
  if (dim <= at) return;
  Joined joined{none(), 0.0f, 0.0f, 0.0f};
  float total = 0.0f;
  // Several at a time, so that their loads are under way together.
  constexpr int kTogether = 8;
  const size_t pitch = size_t(heads) * (2 + dim);
  const float* from = partials + (size_t(row.first) * heads + head) * (2 + dim);
  for (u32 first = 0; first < row.count; first += kTogether) {
    float max[kTogether], sum[kTogether], value[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
      if (row.count <= first + i) break;
      max[i] = from[i * pitch], sum[i] = from[i * pitch + 1], value[i] = from[i * pitch + 2 + at];
    }
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
      if (row.count <= first + i) break;
      joined.join(max[i], sum[i]);
      total = joined.value(total, value[i]);
    }
    from += kTogether * pitch;
  }
  out[(size_t(row.row) * heads + head) * dim + at] = joined.result(total);
}

extern "C" __global__ void __launch_bounds__(32) herd_attention_split_32(
    const float* qkv, const bf16* memory, const u32* position, const u32* table, const u32* blocks,
    const u32* blocks_start, const u32* blocks_first, u32 chunk, const Item* items, int group, int kv_heads, int dim,
    const u32* partials_start, float* partials) {
  const Cache cache{memory, position, table, blocks, blocks_start, blocks_first, chunk};
  attention_split<32>(qkv, items[blockIdx.x], cache, Heads{group, kv_heads, dim}, partials_start, partials);
}

extern "C" __global__ void __launch_bounds__(128) herd_attention_whole_32(
    const float* qkv, const bf16* memory, const u32* position, const u32* table, const u32* blocks,
    const u32* blocks_start, const u32* blocks_first, u32 chunk, const Item* items, int group, int kv_heads, int dim,
    bf16* out) {
  const Cache cache{memory, position, table, blocks, blocks_start, blocks_first, chunk};
  attention_whole<32>(qkv, items[blockIdx.x], cache, Heads{group, kv_heads, dim}, out);
}

extern "C" __global__ void __launch_bounds__(32) herd_attention_split_64(
    const float* qkv, const bf16* memory, const u32* position, const u32* table, const u32* blocks,
    const u32* blocks_start, const u32* blocks_first, u32 chunk, const Item* items, int group, int kv_heads, int dim,
    const u32* partials_start, float* partials) {
  const Cache cache{memory, position, table, blocks, blocks_start, blocks_first, chunk};
  attention_split<64>(qkv, items[blockIdx.x], cache, Heads{group, kv_heads, dim}, partials_start, partials);
}

extern "C" __global__ void __launch_bounds__(128) herd_attention_whole_64(
    const float* qkv, const bf16* memory, const u32* position, const u32* table, const u32* blocks,
    const u32* blocks_start, const u32* blocks_first, u32 chunk, const Item* items, int group, int kv_heads, int dim,
    bf16* out) {
  const Cache cache{memory, position, table, blocks, blocks_start, blocks_first, chunk};
  attention_whole<64>(qkv, items[blockIdx.x], cache, Heads{group, kv_heads, dim}, out);
}

extern "C" __global__ void __launch_bounds__(32) herd_attention_split_128(
    const float* qkv, const bf16* memory, const u32* position, const u32* table, const u32* blocks,
    const u32* blocks_start, const u32* blocks_first, u32 chunk, const Item* items, int group, int kv_heads, int dim,
    const u32* partials_start, float* partials) {
  const Cache cache{memory, position, table, blocks, blocks_start, blocks_first, chunk};
  attention_split<128>(qkv, items[blockIdx.x], cache, Heads{group, kv_heads, dim}, partials_start, partials);
}

extern "C" __global__ void __launch_bounds__(128) herd_attention_whole_128(
    const float* qkv, const bf16* memory, const u32* position, const u32* table, const u32* blocks,
    const u32* blocks_start, const u32* blocks_first, u32 chunk, const Item* items, int group, int kv_heads, int dim,
    bf16* out) {
  const Cache cache{memory, position, table, blocks, blocks_start, blocks_first, chunk};
  attention_whole<128>(qkv, items[blockIdx.x], cache, Heads{group, kv_heads, dim}, out);
}
