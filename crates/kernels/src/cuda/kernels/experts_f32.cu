// The routed experts of one layer in the reference profile: f32 rows, and the CPU's order of additions.
//
//   act[i, :]      = silu(gate) * up, both products of row i of the order with the weights of its slot
//   results[row]   = act[i, :] * down^T
//
//   sources, offsets, order   as in `experts.cu`; rows and results are f32
//   slots     [slots]       row-major weights, f32 or bf16: [2 * width, hidden], gates first, and [hidden, width]; scales
//                           [2 * width] and [hidden] f32, or null
//   act       [rows, width] f32
//
// Launch:  x: groups of 64 outputs; y: slots; 64 threads, one output each. A block goes through the rows of its slot,
//          8 at a time.
// Order:   one chain of fused multiply-adds over k = 0, 1, ...; then the scale.
// Bound:   the caches: a thread reads its own row of weights. It is a reference, not meant to be fast.
// Twin:    Cpu::experts in f32; equal bit for bit.

constexpr int kRows = 8;

using Source = SourceOf<float>;

template <class Weight>
struct Slot {
  const Weight* gate_up;
  const float* gate_up_scales;
  const Weight* down;
  const float* down_scales;
};

// out[r] = sum of x[r][k] * w[k], for up to 8 rows.
template <class Weight>
HERD_INLINE void dot_rows(const float* const (&x)[kRows], int rows, const Weight* w, int inputs, const float* scale,
                          float (&out)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; r++) out[r] = 0.0f;
  for (int k = 0; k < inputs; k++) {
    const float weight = widen(w[k]);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (r < rows) out[r] = fmaf(x[r][k], weight, out[r]);
    }
  }
  if (scale == nullptr) return;
#pragma unroll
  for (int r = 0; r < kRows; r++) out[r] *= *scale;
}

HERD_INLINE const float* at_or_null(const float* scales, int output) {
  return scales == nullptr ? nullptr : scales + output;
}

template <class Weight>
HERD_INLINE void gate_up(const Source* sources, const u32* offsets, const RowOfSource* order, const Slot<Weight>* slots,
                         float* act, int hidden, int width) {
  const int column = int(blockIdx.x * blockDim.x + threadIdx.x);
  const u32 end = offsets[blockIdx.y + 1];
  if (width <= column) return;
  const Slot<Weight> slot = slots[blockIdx.y];
  for (u32 first = offsets[blockIdx.y]; first < end; first += kRows) {
    const int rows = int(min(end - first, u32(kRows)));
    const float* x[kRows] = {};
    for (int r = 0; r < rows; r++) {
      const RowOfSource from = order[first + r];
      x[r] = sources[from.source].rows + size_t(from.row) * hidden;
    }
    float gate[kRows], up[kRows];
    dot_rows(x, rows, slot.gate_up + size_t(column) * hidden, hidden, at_or_null(slot.gate_up_scales, column), gate);
    const int second = width + column;
    dot_rows(x, rows, slot.gate_up + size_t(second) * hidden, hidden, at_or_null(slot.gate_up_scales, second), up);
    for (int r = 0; r < rows; r++) act[size_t(first + r) * width + column] = gate[r] * sigmoid(gate[r]) * up[r];
  }
}

template <class Weight>
HERD_INLINE void down(const Source* sources, const u32* offsets, const RowOfSource* order, const Slot<Weight>* slots,
                      const float* act, int hidden, int width) {
  const int column = int(blockIdx.x * blockDim.x + threadIdx.x);
  const u32 end = offsets[blockIdx.y + 1];
  if (hidden <= column) return;
  const Slot<Weight> slot = slots[blockIdx.y];
  for (u32 first = offsets[blockIdx.y]; first < end; first += kRows) {
    const int rows = int(min(end - first, u32(kRows)));
    const float* x[kRows] = {};
    for (int r = 0; r < rows; r++) x[r] = act + size_t(first + r) * width;
    float sum[kRows];
    dot_rows(x, rows, slot.down + size_t(column) * width, width, at_or_null(slot.down_scales, column), sum);
    for (int r = 0; r < rows; r++) {
      const RowOfSource to = order[first + r];
      sources[to.source].results[size_t(to.row) * hidden + column] = sum[r];
    }
  }
}

extern "C" __global__ void herd_experts_f32_gate_up_f32(const Source* sources, const u32* offsets,
                                                        const RowOfSource* order, const Slot<float>* slots, float* act,
                                                        int hidden, int width) {
  gate_up(sources, offsets, order, slots, act, hidden, width);
}

extern "C" __global__ void herd_experts_f32_gate_up_bf16(const Source* sources, const u32* offsets,
                                                         const RowOfSource* order, const Slot<bf16>* slots, float* act,
                                                         int hidden, int width) {
  gate_up(sources, offsets, order, slots, act, hidden, width);
}

extern "C" __global__ void herd_experts_f32_down_f32(const Source* sources, const u32* offsets,
                                                     const RowOfSource* order, const Slot<float>* slots,
                                                     const float* act, int hidden, int width) {
  down(sources, offsets, order, slots, act, hidden, width);
}

extern "C" __global__ void herd_experts_f32_down_bf16(const Source* sources, const u32* offsets,
                                                      const RowOfSource* order, const Slot<bf16>* slots,
                                                      const float* act, int hidden, int width) {
  down(sources, offsets, order, slots, act, hidden, width);
}
