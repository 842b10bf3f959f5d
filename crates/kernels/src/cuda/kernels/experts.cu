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
// Launch:  256 threads; x: groups of 4 (`few`) or 8 (`many`) tiles of 16 outputs; y: slots. A block goes through the
//          rows of its slot, up to 16 or 128 at a time; it ends at once if there are none, so the host need not know
//          who sent what.
// Order:   `tiles.cuh`; the same for every number of rows.
// Bound:   memory while a slot has up to some 64 rows. Two blocks of `few` on an SM have 64 KiB on their way, which at
//          1 us is 8.6 TB/s over 132 SMs. FP8 is widened with 2.5 integer operations per pair of weights, and all of
//          `few` takes half of the instructions that an SM of an H200 issues at its share of the memory.
// Twin:    Cpu::experts, whose order of additions is another; equal to `linear_bf16.cu` bit for bit.

constexpr int kFewTiles = 4;
constexpr int kFewRing = 14 * 1024;

using Source = SourceOf<bf16>;

struct Slot {
  const u8* gate_up;
  const float* gate_up_scales;
  const u8* down;
  const float* down_scales;
};

HERD_INLINE float scaled(float x, const float* scales, int output) {
  return scales == nullptr ? x : x * scales[output];
}

// Rows of the sources times gates and ups. Outputs come in pairs: a gate, and 16 outputs on the up of the same column.
struct GateUp {
  static constexpr bool kInPairs = true;
  const Source* sources;
  const RowOfSource* order;
  const u8* weights;
  const float* scales;
  bf16* act;
  int inputs, outputs, width;

  HERD_INLINE GateUp(const Source* sources, const RowOfSource* order, const Slot& slot, bf16* act, int hidden, int width)
      : sources(sources), order(order), weights(slot.gate_up), scales(slot.gate_up_scales), act(act), inputs(hidden),
        outputs((width + kTileOutputs - 1) / kTileOutputs * (2 * kTileOutputs)), width(width) {}

  HERD_INLINE const bf16* token(u32 at) const {
    const RowOfSource from = order[at];
    return sources[from.source].rows + size_t(from.row) * inputs;
  }

  HERD_INLINE void store(u32 at, int output, float gate, float up) const {
    const int column = output / (2 * kTileOutputs) * kTileOutputs + output % kTileOutputs;
    if (width <= column) return;
    gate = scaled(gate, scales, output);
    up = scaled(up, scales, output + kTileOutputs);
    act[size_t(at) * width + column] = to_bf16(gate * sigmoid(gate) * up);
  }
};

struct Down {
  static constexpr bool kInPairs = false;
  const Source* sources;
  const RowOfSource* order;
  const u8* weights;
  const float* scales;
  const bf16* act;
  int inputs, outputs;

  HERD_INLINE Down(const Source* sources, const RowOfSource* order, const Slot& slot, const bf16* act, int hidden,
                   int width)
      : sources(sources), order(order), weights(slot.down), scales(slot.down_scales), act(act), inputs(width),
        outputs(hidden) {}

  HERD_INLINE const bf16* token(u32 at) const { return act + size_t(at) * inputs; }

  HERD_INLINE void store(u32 at, int output, float sum) const {
    if (outputs <= output) return;
    const RowOfSource to = order[at];
    sources[to.source].results[size_t(to.row) * outputs + output] = to_bf16(scaled(sum, scales, output));
  }
};

template <class Tiles, int kN, class Work>
HERD_INLINE void run_chunk(const Work& work, u32 first, u32 end) {
  using Product = Product<Tiles, kFewTiles, kN, kFewRing>;
  HERD_DYNAMIC_SHARED(rings);
  const int first_tile = int(blockIdx.x) * kFewTiles, segments = segments_of<Tiles>(work.inputs);
  Operands<kFewTiles, kN> operands;
  operands.inputs = work.inputs;
  point_at_tiles<Tiles>(operands.tile, work.weights, first_tile, work.outputs, work.inputs);
  Product::start(rings, operands);
#pragma unroll
  for (int n = 0; n < kN; n++) {
    const u32 at = first + n * kTileTokens + lane_id() / 4;
    operands.token[n] = at < end ? work.token(at) : nullptr;
  }
  Product::park_all(rings, operands);
  constexpr int kEach = Work::kInPairs ? Product::kOutputs / 2 : Product::kOutputs;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < Product::kTokens * kEach; i += int(blockDim.x)) {
    const int token = i / kEach, inner = i % kEach;
    if (end <= first + token) continue;
    if constexpr (Work::kInPairs) {
      const int output = inner / kTileOutputs * (2 * kTileOutputs) + inner % kTileOutputs;
      work.store(first + token, first_tile * kTileOutputs + output, Product::total(rings, segments, token, output),
                 Product::total(rings, segments, token, output + kTileOutputs));
    } else {
      const float sum = Product::total(rings, segments, token, inner);
      work.store(first + token, first_tile * kTileOutputs + inner, sum);
    }
  }
  __syncthreads();
}

// The rows from `first` to before `end`.
template <class Tiles, class Work>
HERD_INLINE void run_few(const Work& work, u32 first, u32 end) {
#pragma unroll 1
  for (; first + kTileTokens < end; first += 2 * kTileTokens) run_chunk<Tiles, 2>(work, first, end);
  if (first < end) run_chunk<Tiles, 1>(work, first, end);
}

template <class Tiles, class Work>
HERD_INLINE void run_many(const Work& work, u32 first, u32 end) {
  using Product = WideProduct<Tiles>;
  HERD_DYNAMIC_SHARED(ring);
  const int first_output = int(blockIdx.x) * Product::kOutputs;
  Operands<1, 2> operands;
  operands.inputs = work.inputs;
  point_at_tiles<Tiles>(operands.tile, work.weights, first_output / kTileOutputs + warp_id(), work.outputs, work.inputs);
#pragma unroll 1
  for (; first < end; first += Product::kTokens) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const u32 at = first + (2 * warp_id() + n) * kTileTokens + lane_id() / 4;
      operands.token[n] = at < end ? work.token(at) : nullptr;
    }
    Product product;
    product.run(ring, operands, int(end - first));
#pragma unroll
    for (int m = 0; m < Product::kM; m += Work::kInPairs ? 2 : 1) {
#pragma unroll
      for (int n = 0; n < Product::kN; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const u32 at = first + Product::token_of(n, i);
          const int output = first_output + Product::output_of(m, i);
          if (end <= at) continue;
          if constexpr (Work::kInPairs) work.store(at, output, product.total[m][n][i], product.total[m + 1][n][i]);
          else work.store(at, output, product.total[m][n][i]);
        }
      }
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(256, 2) herd_experts_gate_up_bf16_few(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_few<Bf16Tiles>(GateUp(sources, order, slots[blockIdx.y], act, hidden, width), first, end);
}

extern "C" __global__ void __launch_bounds__(256) herd_experts_gate_up_bf16_many(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_many<Bf16Tiles>(GateUp(sources, order, slots[blockIdx.y], act, hidden, width), first, end);
}

extern "C" __global__ void __launch_bounds__(256, 2) herd_experts_gate_up_fp8_few(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_few<Fp8Tiles>(GateUp(sources, order, slots[blockIdx.y], act, hidden, width), first, end);
}

extern "C" __global__ void __launch_bounds__(256) herd_experts_gate_up_fp8_many(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_many<Fp8Tiles>(GateUp(sources, order, slots[blockIdx.y], act, hidden, width), first, end);
}

extern "C" __global__ void __launch_bounds__(256, 2) herd_experts_down_bf16_few(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, const bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_few<Bf16Tiles>(Down(sources, order, slots[blockIdx.y], act, hidden, width), first, end);
}

extern "C" __global__ void __launch_bounds__(256) herd_experts_down_bf16_many(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, const bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_many<Bf16Tiles>(Down(sources, order, slots[blockIdx.y], act, hidden, width), first, end);
}

extern "C" __global__ void __launch_bounds__(256, 2) herd_experts_down_fp8_few(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, const bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_few<Fp8Tiles>(Down(sources, order, slots[blockIdx.y], act, hidden, width), first, end);
}

extern "C" __global__ void __launch_bounds__(256) herd_experts_down_fp8_many(
    const Source* sources, const u32* offsets, const RowOfSource* order, const Slot* slots, const bf16* act, int hidden,
    int width) {
  const u32 first = offsets[blockIdx.y], end = offsets[blockIdx.y + 1];
  run_many<Fp8Tiles>(Down(sources, order, slots[blockIdx.y], act, hidden, width), first, end);
}
