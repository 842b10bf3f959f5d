// Operations that treat every element of a row alike, and the gathering of rows.
//
//   swiglu    out[row, i] = silu(gate_up[row, i]) * gate_up[row, width + i]; gate_up f32, out f32 or bf16
//   add       x[row, i] += y[row, i]; both f32
//   pack      wire[row, i] = h[row, i] * scores[row]; h and wire both f32 or both bf16, scores f32
//   add_wire  x[row, i] += wire[row, i]; x f32, wire f32 or bf16
//   select    out[row, i] = x[chosen[row], i]; f32
//   zero      count times 16 bytes
//
// Launch:  grid (rows, ceil(columns / 1024)), 256 threads of 4 columns each. `zero`: one thread per 16 bytes.
// Bound:   memory; latency at few rows.
// Twin:    norm::{swiglu, add, scale_rows}, Cpu::{add_wire, select}; equal bit for bit.

constexpr int kColumns = 4;

// First column of this thread.
HERD_INLINE int first_column() { return int(blockIdx.y * blockDim.x + threadIdx.x) * kColumns; }

template <class T>
HERD_INLINE T* row_of(T* x, int columns) {
  return x + size_t(blockIdx.x) * columns;
}

template <class Out>
HERD_INLINE void swiglu(const float* gate_up, Out* out, int width) {
  const int column = first_column();
  if (column >= width) return;
  const float* row = row_of(gate_up, 2 * width);
  const Four gate = load_4(row, column, width), up = load_4(row + width, column, width);
  Four y;
  for (int i = 0; i < kColumns; i++) y.at[i] = gate.at[i] * sigmoid(gate.at[i]) * up.at[i];
  store_4(y, row_of(out, width), column, width);
}

extern "C" __global__ void herd_swiglu_f32(const float* gate_up, float* out, int width) {
  swiglu(gate_up, out, width);
}

extern "C" __global__ void herd_swiglu_bf16(const float* gate_up, bf16* out, int width) {
  swiglu(gate_up, out, width);
}

template <class T>
HERD_INLINE void add(float* x, const T* y, int columns) {
  const int column = first_column();
  if (column >= columns) return;
  float* to = row_of(x, columns);
  Four sum = load_4(to, column, columns);
  const Four more = load_4(row_of(y, columns), column, columns);
  for (int i = 0; i < kColumns; i++) sum.at[i] += more.at[i];
  store_4(sum, to, column, columns);
}

extern "C" __global__ void herd_add_f32(float* x, const float* y, int columns) { add(x, y, columns); }

extern "C" __global__ void herd_add_bf16(float* x, const bf16* y, int columns) { add(x, y, columns); }

template <class T>
HERD_INLINE void pack(const T* h, const float* scores, T* wire, int columns) {
  const int column = first_column();
  if (column >= columns) return;
  const float score = scores[blockIdx.x];
  Four scaled = load_4(row_of(h, columns), column, columns);
  for (int i = 0; i < kColumns; i++) scaled.at[i] *= score;
  store_4(scaled, row_of(wire, columns), column, columns);
}

extern "C" __global__ void herd_pack_f32(const float* h, const float* scores, float* wire, int columns) {
  pack(h, scores, wire, columns);
}

extern "C" __global__ void herd_pack_bf16(const bf16* h, const float* scores, bf16* wire, int columns) {
  pack(h, scores, wire, columns);
}

extern "C" __global__ void herd_select(const float* x, const u32* chosen, float* out, int columns) {
  const int column = first_column();
  if (column >= columns) return;
  const float* from = x + size_t(chosen[blockIdx.x]) * columns;
  store_4(load_4(from, column, columns), row_of(out, columns), column, columns);
}

extern "C" __global__ void herd_zero(uint4* to, u64 count) {
  const u64 at = u64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < count) to[at] = uint4{0, 0, 0, 0};
}
