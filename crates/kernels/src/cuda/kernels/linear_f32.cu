// out[row, n] = scales[n] * sum over k of x[row, k] * w[n, k].
//
//   x       [rows, inputs]     f32
//   w       [outputs, inputs]  f32 or bf16, row-major
//   scales  [outputs]          f32, or null
//   out     [rows, outputs]    f32
//
// Launch:  grid (ceil(outputs / 64), ceil(rows / 32)), 256 threads; a block makes 32 x 64 elements, a thread 2 x 4.
// Order:   one chain of fused multiply-adds per element, k = 0, 1, 2, ….
// Bound:   f32 arithmetic at many rows, w's bytes at few. The reference profile: it is far from both.
// Twin:    gemm::linear; equal bit for bit.

constexpr int kThreads = 256;
constexpr int kRows = 32, kOutputs = 64, kInputs = 32;
// Elements of a thread: rows 16 apart, outputs 16 apart.
constexpr int kThreadRows = 2, kThreadOutputs = 4, kApart = 16;
// One more than needed, so that threads with neighbouring outputs read from different banks.
constexpr int kStride = kInputs + 1;

// Copies `height` rows of `kInputs` elements from (first, k0) of a matrix to shared memory.
template <int height, class T>
HERD_INLINE void copy_tile(const T* from, int first, int rows, int k0, int inputs, float* to) {
  for (int i = int(threadIdx.x); i < height * kInputs; i += kThreads) {
    const int row = i / kInputs, k = i % kInputs;
    const bool inside = first + row < rows && k0 + k < inputs;
    to[row * kStride + k] = inside ? widen(from[size_t(first + row) * inputs + k0 + k]) : 0.0f;
  }
}

template <class T>
HERD_INLINE void linear(const float* x, const T* w, const float* scales, float* out, int rows, int outputs, int inputs) {
  __shared__ float x_tile[kRows * kStride];
  __shared__ float w_tile[kOutputs * kStride];
  const int first_row = int(blockIdx.y) * kRows, first_output = int(blockIdx.x) * kOutputs;
  const int row = int(threadIdx.x) / kApart, output = int(threadIdx.x) % kApart;
  float sums[kThreadRows][kThreadOutputs] = {};
  for (int k0 = 0; k0 < inputs; k0 += kInputs) {
    copy_tile<kRows>(x, first_row, rows, k0, inputs, x_tile);
    copy_tile<kOutputs>(w, first_output, outputs, k0, inputs, w_tile);
    __syncthreads();
    // No step past the last input: adding +0 would change a sum of -0.
    const int count = min(kInputs, inputs - k0);
    for (int k = 0; k < count; k++) {
      for (int r = 0; r < kThreadRows; r++) {
        for (int n = 0; n < kThreadOutputs; n++) {
          const float factor = w_tile[(output + n * kApart) * kStride + k];
          sums[r][n] = fmaf(x_tile[(row + r * kApart) * kStride + k], factor, sums[r][n]);
        }
      }
    }
    __syncthreads();
  }
  for (int r = 0; r < kThreadRows; r++) {
    for (int n = 0; n < kThreadOutputs; n++) {
      const int to_row = first_row + row + r * kApart, to_output = first_output + output + n * kApart;
      if (to_row >= rows || to_output >= outputs) continue;
      const float sum = sums[r][n];
      out[size_t(to_row) * outputs + to_output] = scales == nullptr ? sum : sum * scales[to_output];
    }
  }
}

extern "C" __global__ void __launch_bounds__(256) herd_linear_f32(const float* x, const float* w, const float* scales,
                                                                  float* out, int rows, int outputs, int inputs) {
  linear(x, w, scales, out, rows, outputs, inputs);
}

extern "C" __global__ void __launch_bounds__(256) herd_linear_f32_bf16(const float* x, const bf16* w,
                                                                       const float* scales, float* out, int rows,
                                                                       int outputs, int inputs) {
  linear(x, w, scales, out, rows, outputs, inputs);
}
