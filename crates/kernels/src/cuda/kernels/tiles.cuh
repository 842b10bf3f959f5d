// Products with tiled weights (`tiles.rs`), as the tensor cores take them: weights are the left operand (16 outputs),
// tokens the right one (8 tokens), so a token's column never sees its neighbours.
//
// Order: the tiles of K are cut into segments, 8 if there are as many tiles. Every segment is summed from 0 by
//        mma.m16n8k16 in ascending steps, the segments are added in order to 0. So the shape of the weights fixes the
//        order; neither the number of tokens nor the share of a warp changes a bit.
// Few:   `Product`, up to 64 tokens per block. A warp takes a segment. A lane copies what it alone reads, 16 bytes at a
//        time, through its warp's ring in shared memory, so nothing but its own copies is waited for.
// Many:  `WideProduct`, 128 tokens per block. Its warps share a ring and go through the segments together.

constexpr int kTileBytes = 1024;
constexpr int kPiece = 512;  // 16 bytes for every lane
constexpr int kTileOutputs = 16;
constexpr int kTileTokens = 8;
constexpr int kSegmentsMax = 8;

// A tile's two pieces are the rows g and g + 8 of lane 4 g + t, 8 neighbouring inputs from 8 t. `left` gives the left
// operands of two steps: those that one piece of the tokens is multiplied with.
struct Bf16Tiles {
  static constexpr int kInputs = 32;
  static constexpr int kTokenPieces = 1;

  static HERD_INLINE void left(const u8* low_piece, int, u32 (&a)[2][4]) {
    const uint4 low = load_16(low_piece), high = load_16(low_piece + kPiece);
    a[0][0] = low.x, a[0][1] = high.x, a[0][2] = low.y, a[0][3] = high.y;
    a[1][0] = low.z, a[1][1] = high.z, a[1][2] = low.w, a[1][3] = high.w;
  }
};

// As above with 8 more inputs from 32 + 8 t, the second half of a lane's bytes. A word holds four weights, spread so that few operations widen them: the first
// and second have their sign at bit 15 and the other bits at 4..10 of the lower and the upper half; the third and
// fourth lie in the gaps, sign at bit 11, the lower four bits at 0..3, the upper three at 12..14. Every other eight
// lanes have their two halves swapped, so that half of 16 lanes' bytes lie in banks of their own.
struct Fp8Tiles {
  static constexpr int kInputs = 64;
  static constexpr int kTokenPieces = 2;

  static HERD_INLINE void widen4(u32 word, u32& first, u32& second) {
    constexpr u32 kPlaces = 0x87f087f0u, kFactor = 0x7b807b80u;  // 2^120: see `e4m3x2_to_bf16x2`
    first = mul_bf16x2(word & kPlaces, kFactor);
    second = mul_bf16x2((word << 4 & 0x80f080f0u) | (word >> 4 & 0x07000700u), kFactor);
  }

  static HERD_INLINE void left(const u8* low_piece, int half, u32 (&a)[2][4]) {
    const int at = half ^ (lane_id() >> 3 & 1);
    const uint2 low = reinterpret_cast<const uint2*>(low_piece)[at];
    const uint2 high = reinterpret_cast<const uint2*>(low_piece + kPiece)[at];
    widen4(low.x, a[0][0], a[0][2]);
    widen4(high.x, a[0][1], a[0][3]);
    widen4(low.y, a[1][0], a[1][2]);
    widen4(high.y, a[1][1], a[1][3]);
  }
};

// Tiles of K, and the segments that they are cut into.
template <class Tiles>
HERD_INLINE int tiles_of(int inputs) {
  return (inputs + Tiles::kInputs - 1) / Tiles::kInputs;
}

template <class Tiles>
HERD_INLINE int segments_of(int inputs) {
  return min(tiles_of<Tiles>(inputs), kSegmentsMax);
}

// What a warp works on: `kM` tiles of outputs and `kN` tiles of tokens.
template <int kM, int kN>
struct Operands {
  const u8* tile[kM];     // the first tile of K, this lane's bytes
  const bf16* token[kN];  // the row that this lane copies from; null for a token that is not there
  int inputs;
};

// `kRing`: bytes of shared memory of a warp.
template <class Tiles, int kM, int kN, int kRing>
struct Product {
  static constexpr int kStage = kPiece * (2 * kM + Tiles::kTokenPieces * kN);
  static constexpr int kStages = kRing / kStage < 6 ? kRing / kStage : 6;
  static constexpr int kTokens = kTileTokens * kN;
  static constexpr int kOutputs = kTileOutputs * kM;
  static constexpr int kPitch = kOutputs + 4;  // floats; no two lanes of a store share a bank
  static_assert(2 <= kStages && kTokens * kPitch * 4 <= kRing);

  float sum[kM][kN][4];

  static HERD_INLINE void copy_tiles(u8* stage, const Operands<kM, kN>& x, int k) {
#pragma unroll
    for (int m = 0; m < kM; m++) {
      const u8* from = x.tile[m] + size_t(k) * kTileBytes;
      copy_async(stage + 2 * m * kPiece, from, true);
      copy_async(stage + (2 * m + 1) * kPiece, from + kPiece, true);
    }
  }

  static HERD_INLINE void copy_tokens(u8* stage, const Operands<kM, kN>& x, int k) {
    const int input = k * Tiles::kInputs + lane_id() % 4 * 8;
#pragma unroll
    for (int n = 0; n < kN; n++) {
#pragma unroll
      for (int piece = 0; piece < Tiles::kTokenPieces; piece++) {
        const int at = input + 32 * piece;
        const bool is_there = x.token[n] != nullptr && at < x.inputs;
        copy_async(stage + (2 * kM + n * Tiles::kTokenPieces + piece) * kPiece, x.token[n] + at, is_there);
      }
    }
  }

  HERD_INLINE void multiply(const u8* stage) {
    // Unrolled, FP8 would need more registers than two blocks on an SM have.
#pragma unroll 1
    for (int piece = 0; piece < Tiles::kTokenPieces; piece++) {
      uint4 right[kN];
#pragma unroll
      for (int n = 0; n < kN; n++) {
        right[n] = load_16(stage + (2 * kM + n * Tiles::kTokenPieces + piece) * kPiece);
      }
#pragma unroll
      for (int m = 0; m < kM; m++) {
        u32 left[2][4];
        Tiles::left(stage + 2 * m * kPiece, piece, left);
#pragma unroll
        for (int n = 0; n < kN; n++) mma_bf16(sum[m][n], left[0], right[n].x, right[n].y);
#pragma unroll
        for (int n = 0; n < kN; n++) mma_bf16(sum[m][n], left[1], right[n].z, right[n].w);
      }
    }
  }

  // This warp's segment of K, the tiles from `first` to before `last`, when `start` has begun to copy the first weights.
  // `ring` is the warp's.
  HERD_INLINE void run(u8* ring, const Operands<kM, kN>& x, int first, int last) {
    u8* const mine = ring + lane_id() * 16;
#pragma unroll
    for (int i = 0; i < kM * kN * 4; i++) sum[i / (4 * kN)][i / 4 % kN][i % 4] = 0.0f;
#pragma unroll 1
    for (int i = 0; i < kStages - 1; i++) {
      if (first + i < last) copy_tokens(mine + i * kStage, x, first + i);
      copy_commit();
    }
    int now = 0, free = kStages - 1;
#pragma unroll 1
    for (int k = first; k < last; k++) {
      copy_wait<kStages - 2>();
      if (k + kStages - 1 < last) {
        copy_tiles(mine + free * kStage, x, k + kStages - 1);
        copy_tokens(mine + free * kStage, x, k + kStages - 1);
      }
      copy_commit();
      multiply(mine + now * kStage);
      now = now + 1 < kStages ? now + 1 : 0;
      free = free + 1 < kStages ? free + 1 : 0;
    }
    copy_wait<0>();
  }

  // Leaves the segment's sums in the warp's ring, `[token][kPitch]`.
  HERD_INLINE void park(u8* ring) const {
    // The lane's first sum; the others are at constant distances.
    float* const to = reinterpret_cast<float*>(ring) + lane_id() % 4 * 2 * kPitch + lane_id() / 4;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kM; m++) {
#pragma unroll
      for (int n = 0; n < kN; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          to[(n * kTileTokens + i % 2) * kPitch + m * kTileOutputs + 8 * (i / 2)] = sum[m][n][i];
        }
      }
    }
  }

  // The sum over all segments, once every warp has parked and the block has met.
  static HERD_INLINE float total(const u8* rings, int segments, int token, int output) {
    float sum = 0.0f;
    for (int segment = 0; segment < segments; segment++) {
      sum += reinterpret_cast<const float*>(rings + segment * kRing)[token * kPitch + output];
    }
    return sum;
  }

  // Begins to copy weights: they are on their way while the tokens are looked for.
  static HERD_INLINE void start(u8* rings, const Operands<kM, kN>& x) {
    const int tiles = tiles_of<Tiles>(x.inputs), segments = segments_of<Tiles>(x.inputs), segment = warp_id();
    if (segments <= segment) return;
    const int first = tiles * segment / segments, last = tiles * (segment + 1) / segments;
    u8* const mine = rings + segment * kRing + lane_id() * 16;
#pragma unroll 1
    for (int i = 0; i < kStages - 1 && first + i < last; i++) copy_tiles(mine + i * kStage, x, first + i);
  }

  // All segments of one block, from `start` to parked sums.
  static HERD_INLINE void park_all(u8* rings, const Operands<kM, kN>& x) {
    const int tiles = tiles_of<Tiles>(x.inputs), segments = segments_of<Tiles>(x.inputs), segment = warp_id();
    if (segment < segments) {
      u8* const ring = rings + segment * kRing;
      Product product;
      product.run(ring, x, tiles * segment / segments, tiles * (segment + 1) / segments);
      product.park(ring);
    }
    __syncthreads();
  }
};

// 128 outputs by 128 tokens for a block of 8 warps, 2 by 4 of them. Every warp copies one tile of outputs (`x.tile`)
// and two of tokens (`x.token`) for all.
template <class Tiles>
struct WideProduct {
  static constexpr int kM = 4, kN = 4, kAcross = 4;
  static constexpr int kTokens = kTileTokens * kN * kAcross;
  static constexpr int kOutputs = 2 * kTileOutputs * kM;
  static constexpr int kTokenPiece = 4 * kM;  // index of the first piece of tokens
  static constexpr int kStage = kPiece * (kTokenPiece + kN * kAcross * Tiles::kTokenPieces);
  static constexpr int kStages = 4;

  float total[kM][kN][4], sum[kM][kN][4];

  static HERD_INLINE void copy(u8* stage, const Operands<1, 2>& x, int k) {
    u8* const mine = stage + lane_id() * 16;
    const u8* tile = x.tile[0] + size_t(k) * kTileBytes;
    copy_async(mine + 2 * warp_id() * kPiece, tile, true);
    copy_async(mine + (2 * warp_id() + 1) * kPiece, tile + kPiece, true);
    const int input = k * Tiles::kInputs + lane_id() % 4 * 8;
#pragma unroll
    for (int i = 0; i < 2 * Tiles::kTokenPieces; i++) {
      const bf16* const token = x.token[i / Tiles::kTokenPieces];
      const int at = input + i % Tiles::kTokenPieces * 32;
      const bool is_there = token != nullptr && at < x.inputs;
      copy_async(mine + (kTokenPiece + 2 * Tiles::kTokenPieces * warp_id() + i) * kPiece, token + at, is_there);
    }
  }

  HERD_INLINE void multiply(const u8* stage) {
    const u8* const lefts = stage + warp_id() / kAcross * (2 * kM * kPiece) + lane_id() * 16;
    const u8* const rights =
        stage + (kTokenPiece + warp_id() % kAcross * kN * Tiles::kTokenPieces) * kPiece + lane_id() * 16;
#pragma unroll
    for (int piece = 0; piece < Tiles::kTokenPieces; piece++) {
      uint4 right[kN];
#pragma unroll
      for (int n = 0; n < kN; n++) right[n] = load_16(rights + (n * Tiles::kTokenPieces + piece) * kPiece);
#pragma unroll
      for (int m = 0; m < kM; m++) {
        u32 left[2][4];
        Tiles::left(lefts + 2 * m * kPiece, piece, left);
#pragma unroll
        for (int n = 0; n < kN; n++) mma_bf16(sum[m][n], left[0], right[n].x, right[n].y);
#pragma unroll
        for (int n = 0; n < kN; n++) mma_bf16(sum[m][n], left[1], right[n].z, right[n].w);
      }
    }
  }

  // The products, left in `total`; there are `tokens` tokens. The ring is free for others after the block has met.
  HERD_INLINE void run(u8* ring, const Operands<1, 2>& x, int tokens) {
    const bool has_tokens = warp_id() % kAcross * (kN * kTileTokens) < tokens;
    const int tiles = tiles_of<Tiles>(x.inputs), segments = segments_of<Tiles>(x.inputs);
#pragma unroll
    for (int i = 0; i < kM * kN * 4; i++) {
      total[i / (4 * kN)][i / 4 % kN][i % 4] = 0.0f;
      sum[i / (4 * kN)][i / 4 % kN][i % 4] = 0.0f;
    }
#pragma unroll 1
    for (int i = 0; i < kStages - 1; i++) {
      if (i < tiles) copy(ring + i * kStage, x, i);
      copy_commit();
    }
    int now = 0, free = kStages - 1, segment = 1;
#pragma unroll 1
    for (int k = 0; k < tiles; k++) {
      copy_wait<kStages - 2>();
      __syncthreads();
      if (k + kStages - 1 < tiles) copy(ring + free * kStage, x, k + kStages - 1);
      copy_commit();
      if (has_tokens) multiply(ring + now * kStage);
      now = now + 1 < kStages ? now + 1 : 0;
      free = free + 1 < kStages ? free + 1 : 0;
      if (k + 1 == tiles * segment / segments) {
        segment++;
#pragma unroll
        for (int i = 0; i < kM * kN * 4; i++) {
          total[i / (4 * kN)][i / 4 % kN][i % 4] += sum[i / (4 * kN)][i / 4 % kN][i % 4];
          sum[i / (4 * kN)][i / 4 % kN][i % 4] = 0.0f;
        }
      }
    }
    copy_wait<0>();
  }

  // Output and token, within the block, of this lane's `total[m][n][i]`.
  static HERD_INLINE int output_of(int m, int i) {
    return (warp_id() / kAcross * kM + m) * kTileOutputs + lane_id() / 4 + 8 * (i / 2);
  }

  static HERD_INLINE int token_of(int n, int i) {
    return (warp_id() % kAcross * kN + n) * kTileTokens + lane_id() % 4 * 2 + i % 2;
  }
};

// This lane's bytes of the `kM` tiles of outputs from `first`; past the end the last one again, for nobody.
template <class Tiles, int kM>
HERD_INLINE void point_at_tiles(const u8* (&tile)[kM], const u8* weights, int first, int outputs, int inputs) {
  const int across = tiles_of<Tiles>(inputs);
  const int last = (outputs + kTileOutputs - 1) / kTileOutputs - 1;
#pragma unroll
  for (int m = 0; m < kM; m++) {
    tile[m] = weights + size_t(min(first + m, last)) * across * kTileBytes + lane_id() * 16;
  }
}
