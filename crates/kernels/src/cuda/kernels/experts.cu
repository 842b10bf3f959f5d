// The routed experts of one layer over the rows that arrived: gate and up with SwiGLU, then down.
//
//   act[i, :]      = silu(gate) * up, both products of row i of the order with the weights of its slot
//   results[row]   = act[i, :] * down^T, rounded to bf16, in the memory of the source it came from
//
//   sources   rows and results [count, hidden] bf16 each
//   offsets   [slots + 1]      u32: where a slot's rows begin in `order` (`dispatch.cu`)
//   order     [rows]           source and row
//   slots     [slots]          tiled weights: [2 * width, hidden], 16 gates and 16 ups in turn, and [hidden, width];
//                              their scales, or null. A change of placement rewrites this table and nothing else
//   act       [rows, width]    bf16
//
// Launch:  x: groups of 4 tiles of 16 outputs; y: slots; one warp per segment of K; RING bytes of shared memory per
//          warp. A block goes through the rows of its slot, up to 16 (`few`) or 64 (`many`) at a time; it ends at once
//          if there are none, so the host need not know who sent what.
// Order:   `tiles.cuh`; the same for every number of rows.
// Bound:   memory while a slot has up to some 64 rows. Two blocks of `few` on an SM have 64 KiB on their way, which at
//          1 us is 8.6 TB/s over 132 SMs. FP8 is widened with 2 integer operations per pair of weights: half of what
//          an SM of an H200 can do at its share of the memory.
// Twin:    Cpu::experts, whose order of additions is another; equal to `linear_bf16.cu` bit for bit.

constexpr int kTiles = 4;
constexpr int kFewRing = 14 * 1024;
constexpr int kManyRing = 24 * 1024;

struct Source {
  const u16* experts;
  const bf16* rows;
  bf16* results;
  u32 count;
  u32 unused;
};

struct RowOfSource {
  u32 source, row;
};

struct Slot {
  const u8* gate_up;
  const float* gate_up_scales;
  const u8* down;
  const float* down_scales;
};

HERD_INLINE float scaled(float x, const float* scales, int output) {
  return scales == nullptr ? x : x * scales[output];
}

struct GateUp {
  const Source* sources;
  const RowOfSource* order;
  const u8* weights;
  const float* scales;
  bf16* act;
  int inputs, outputs;  // hidden, and both halves padded to whole tiles
  int width;

  HERD_INLINE const bf16* token(u32 at) const {
    const RowOfSource from = order[at];
    return sources[from.source].rows + size_t(from.row) * inputs;
  }

  template <class Product>
  HERD_INLINE void finish(const u8* rings, u32 first, u32 end) const {
    constexpr int kColumns = Product::kOutputs / 2;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < Product::kTokens * kColumns; i += int(blockDim.x)) {
      const int token = i / kColumns, inner = i % kColumns, column = int(blockIdx.x) * kColumns + inner;
      const int output = inner / kTileOutputs * 2 * kTileOutputs + inner % kTileOutputs;
      if (end <= first + token || width <= column) continue;
      const int row = int(blockIdx.x) * Product::kOutputs + output;
      const float gate = scaled(Product::total(rings, token, output), scales, row);
      const float up = scaled(Product::total(rings, token, output + kTileOutputs), scales, row + kTileOutputs);
      act[size_t(first + token) * width + column] = to_bf16(gate * sigmoid(gate) * up);
    }
  }
};

struct Down {
  const Source* sources;
  const RowOfSource* order;
  const u8* weights;
  const float* scales;
  const bf16* act;
  int inputs, outputs;  // width, hidden

  HERD_INLINE const bf16* token(u32 at) const { return act + size_t(at) * inputs; }

  template <class Product>
  HERD_INLINE void finish(const u8* rings, u32 first, u32 end) const {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < Product::kTokens * Product::kOutputs; i += int(blockDim.x)) {
      const int token = i / Product::kOutputs, output = i % Product::kOutputs;
      const int column = int(blockIdx.x) * Product::kOutputs + output;
      if (end <= first + token || outputs <= column) continue;
      const RowOfSource to = order[first + token];
      bf16* const result = sources[to.source].results + size_t(to.row) * outputs;
      result[column] = to_bf16(scaled(Product::total(rings, token, output), scales, column));
    }
  }
};

template <class Tiles, int kN, int kRing, class Work>
HERD_INLINE void run_chunk(const Work& work, u8* rings, u32 first, u32 end) {
  using Product = Product<Tiles, kTiles, kN, kRing>;
  Operands<kTiles, kN> operands;
  operands.inputs = work.inputs;
  point_at_tiles<Tiles>(operands.tile, work.weights, int(blockIdx.x) * kTiles, work.outputs, work.inputs);
#pragma unroll
  for (int n = 0; n < kN; n++) {
    const u32 at = first + n * kTileTokens + lane_id() / 4;
    operands.token[n] = at < end ? work.token(at) : nullptr;
  }
  Product::park_all(rings, operands);
  work.template finish<Product>(rings, first, end);
  __syncthreads();
}

// The rows from `first` to before `end`.
template <class Tiles, class Work>
HERD_INLINE void run_few(const Work& work, u32 first, u32 end) {
  HERD_DYNAMIC_SHARED(rings);
#pragma unroll 1
  for (; first + kTileTokens < end; first += 2 * kTileTokens) run_chunk<Tiles, 2, kFewRing>(work, rings, first, end);
  if (first < end) run_chunk<Tiles, 1, kFewRing>(work, rings, first, end);
}

template <class Tiles, class Work>
HERD_INLINE void run_many(const Work& work, u32 first, u32 end) {
  HERD_DYNAMIC_SHARED(rings);
#pragma unroll 1
  for (; first + 4 * kTileTokens < end; first += 8 * kTileTokens) {
    run_chunk<Tiles, 8, kManyRing>(work, rings, first, end);
  }
  if (first < end) run_chunk<Tiles, 4, kManyRing>(work, rings, first, end);
}

HERD_INLINE GateUp gate_up_of(const Source* sources, const RowOfSource* order, const Slot* slots, bf16* act, int hidden,
                              int width) {
  const Slot& slot = slots[blockIdx.y];
  const int padded = (width + kTileOutputs - 1) / kTileOutputs * kTileOutputs;
  return GateUp{sources, order, slot.gate_up, slot.gate_up_scales, act, hidden, 2 * padded, width};
}

HERD_INLINE Down down_of(const Source* sources, const RowOfSource* order, const Slot* slots, const bf16* act, int hidden,
                         int width) {
  const Slot& slot = slots[blockIdx.y];
  return Down{sources, order, slot.down, slot.down_scales, act, width, hidden};
}

extern "C" __global__ void __launch_bounds__(256, 2) herd_experts_gate_up_bf16_few(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_few<Bf16Tiles>(gate_up_of(sources, order, slots, act, hidden, width), first, end);
}

extern "C" __global__ void __launch_bounds__(256) herd_experts_gate_up_bf16_many(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_many<Bf16Tiles>(gate_up_of(sources, order, slots, act, hidden, width), first, end);
}

extern "C" __global__ void __launch_bounds__(256, 2) herd_experts_gate_up_fp8_few(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_few<Fp8Tiles>(gate_up_of(sources, order, slots, act, hidden, width), first, end);
}

extern "C" __global__ void __launch_bounds__(256) herd_experts_gate_up_fp8_many(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_many<Fp8Tiles>(gate_up_of(sources, order, slots, act, hidden, width), first, end);
}

extern "C" __global__ void __launch_bounds__(256, 2) herd_experts_down_bf16_few(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, const bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_few<Bf16Tiles>(down_of(sources, order, slots, act, hidden, width), first, end);
}

extern "C" __global__ void __launch_bounds__(256) herd_experts_down_bf16_many(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, const bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_many<Bf16Tiles>(down_of(sources, order, slots, act, hidden, width), first, end);
}

extern "C" __global__ void __launch_bounds__(256, 2) herd_experts_down_fp8_few(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, const bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_few<Fp8Tiles>(down_of(sources, order, slots, act, hidden, width), first, end);
}

extern "C" __global__ void __launch_bounds__(256) herd_experts_down_fp8_many(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, const bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_many<Fp8Tiles>(down_of(sources, order, slots, act, hidden, width), first, end);
}
