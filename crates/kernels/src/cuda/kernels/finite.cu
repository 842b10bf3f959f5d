// flag = min(flag, first row of x with a value that is infinite or no number).
//
//   x     [rows, columns]  f32 or bf16
//   flag  [1]              u32; 0xffffffff before: no row
//
// Launch:  one block of 256 threads per row.
// Bound:   memory, 2 to 4 B per element.
// Twin:    none; the CPU's test looks at every value.

constexpr int kThreads = 256;
constexpr int kColumns = 4;

HERD_INLINE bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

template <class T>
HERD_INLINE void find_row(const T* x, int columns, u32* flag) {
  const T* row = x + size_t(blockIdx.x) * columns;
  bool found = false;
  for (int column = int(threadIdx.x) * kColumns; column < columns; column += kThreads * kColumns) {
    const Four four = load_4(row, column, columns);
    for (int i = 0; i < kColumns; i++) found |= !is_finite(four.at[i]);
  }
  // The minimum of integers is the same in any order.
  if (__any_sync(kAll, found) && lane_id() == 0) atomicMin(flag, u32(blockIdx.x));
}

extern "C" __global__ void herd_finite_f32(const float* x, int columns, u32* flag) { find_row(x, columns, flag); }

extern "C" __global__ void herd_finite_bf16(const bf16* x, int columns, u32* flag) { find_row(x, columns, flag); }

// flags[0..count] = no row.
extern "C" __global__ void herd_finite_reset(u32* flags, int count) {
  const int at = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (at < count) flags[at] = 0xffffffffu;
}
