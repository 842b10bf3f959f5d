// x[row, :] = table[tokens[row], :], widened.
//
//   tokens  [rows]           u32, below the number of rows of `table`
//   table   [vocab, hidden]  f32 or bf16
//   x       [rows, hidden]   f32
//
// Launch:  grid (rows, ceil(hidden / 1024)), 256 threads of 4 columns each.
// Bound:   memory, 6 to 8 B per element; latency at few rows.
// Twin:    Embedding::row; equal bit for bit.

constexpr int kColumns = 4;

template <class T>
HERD_INLINE void embed_row(const u32* tokens, const T* table, float* x, int hidden) {
  const int column = int(blockIdx.y * blockDim.x + threadIdx.x) * kColumns;
  if (column >= hidden) return;
  const T* from = table + size_t(tokens[blockIdx.x]) * hidden;
  store_4(load_4(from, column, hidden), x + size_t(blockIdx.x) * hidden, column, hidden);
}

extern "C" __global__ void herd_embed_f32(const u32* tokens, const float* table, float* x, int hidden) {
  embed_row(tokens, table, x, hidden);
}

extern "C" __global__ void herd_embed_bf16(const u32* tokens, const bf16* table, float* x, int hidden) {
  embed_row(tokens, table, x, hidden);
}
