// out[row, n] = scale[n] * sum over k of x[row, k] * w[n, k]
//
//   x       [rows, inputs]   bf16; inputs a multiple of 8
//   w       [outputs, inputs], tiled: bf16, or e4m3 (`tiles.rs`)
//   scales  [outputs]        f32, or null: 1
//   out     [rows, outputs]  f32
//
// Launch:  256 threads.
//          herd_linear_*_N: x: groups of 2 or 4 tiles of 16 outputs (4 from 32 tokens on); y: groups of N tokens;
//          8 * RING bytes of dynamic shared memory.
//          herd_linear_*_wide: x: groups of 128 tokens; y: groups of 128 outputs, so that blocks that run together
//          share weights; 4 stages of shared memory.
// Order:   `tiles.cuh`; the same for every number of rows.
// Bound:   memory up to some 64 rows: weights are read once, 32 to 128 KiB are on their way to every SM. With 4 tiles
//          of outputs per warp the tokens cost half as many reads of the L2 cache as bf16 weights at 32 tokens.
//          Wide: tensor cores by mma.sync; 128 x 128 x 32 products per 16 KiB of L2 and 48 KiB of shared memory.
// Twin:    gemm::linear, whose order of additions is another.

template <class Tiles, int kM, int kN, int kRing>
HERD_INLINE void linear(const bf16* x, const u8* weights, const float* scales, float* out, int rows, int inputs,
                        int outputs) {
  using Product = Product<Tiles, kM, kN, kRing>;
  HERD_DYNAMIC_SHARED(rings);
  const int first_tile = int(blockIdx.x) * kM, first_row = int(blockIdx.y) * Product::kTokens;
  Operands<kM, kN> operands;
  operands.inputs = inputs;
  point_at_tiles<Tiles>(operands.tile, weights, first_tile, outputs, inputs);
  Product::start(rings, operands);
#pragma unroll
  for (int n = 0; n < kN; n++) {
    const int row = first_row + n * kTileTokens + lane_id() / 4;
    operands.token[n] = row < rows ? x + size_t(row) * inputs : nullptr;
  }
  Product::park_all(rings, operands);
  for (int i = int(threadIdx.x); i < Product::kTokens * Product::kOutputs; i += int(blockDim.x)) {
    const int token = i / Product::kOutputs, output = i % Product::kOutputs;
    const int row = first_row + token, n = first_tile * kTileOutputs + output;
    if (row < rows && n < outputs) {
      const float sum = Product::total(rings, segments_of<Tiles>(inputs), token, output);
      out[size_t(row) * outputs + n] = scales == nullptr ? sum : sum * scales[n];
    }
  }
}

template <class Tiles>
HERD_INLINE void linear_wide(const bf16* x, const u8* weights, const float* scales, float* out, int rows, int inputs,
                             int outputs) {
  using Product = WideProduct<Tiles>;
  HERD_DYNAMIC_SHARED(ring);
  const int first_row = int(blockIdx.x) * Product::kTokens, first_output = int(blockIdx.y) * Product::kOutputs;
  Operands<1, 2> operands;
  operands.inputs = inputs;
  point_at_tiles<Tiles>(operands.tile, weights, first_output / kTileOutputs + warp_id(), outputs, inputs);
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const int row = first_row + (2 * warp_id() + n) * kTileTokens + lane_id() / 4;
    operands.token[n] = row < rows ? x + size_t(row) * inputs : nullptr;
  }
  Product product;
  product.run(ring, operands, rows - first_row);
#pragma unroll
  for (int m = 0; m < Product::kM; m++) {
#pragma unroll
    for (int n = 0; n < Product::kN; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = first_row + Product::token_of(n, i), output = first_output + Product::output_of(m, i);
        const float sum = product.total[m][n][i];
        if (row < rows && output < outputs) {
          out[size_t(row) * outputs + output] = scales == nullptr ? sum : sum * scales[output];
        }
      }
    }
  }
}

constexpr int kSmallRing = 12 * 1024;  // two blocks per SM
constexpr int kLargeRing = 24 * 1024;  // one

extern "C" __global__ void __launch_bounds__(256, 2) herd_linear_bf16_8(const bf16* x, const u8* weights,
                                                                     const float* scales, float* out, int rows,
                                                                     int inputs, int outputs) {
  linear<Bf16Tiles, 2, 1, kSmallRing>(x, weights, scales, out, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(256, 2) herd_linear_bf16_16(const bf16* x, const u8* weights,
                                                                      const float* scales, float* out, int rows,
                                                                      int inputs, int outputs) {
  linear<Bf16Tiles, 2, 2, kSmallRing>(x, weights, scales, out, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(256) herd_linear_bf16_32(const bf16* x, const u8* weights,
                                                                      const float* scales, float* out, int rows,
                                                                      int inputs, int outputs) {
  linear<Bf16Tiles, 4, 4, kLargeRing>(x, weights, scales, out, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(256) herd_linear_bf16_64(const bf16* x, const u8* weights,
                                                                      const float* scales, float* out, int rows,
                                                                      int inputs, int outputs) {
  linear<Bf16Tiles, 4, 8, kLargeRing>(x, weights, scales, out, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(256, 2) herd_linear_fp8_8(const bf16* x, const u8* weights,
                                                                    const float* scales, float* out, int rows,
                                                                    int inputs, int outputs) {
  linear<Fp8Tiles, 2, 1, kSmallRing>(x, weights, scales, out, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(256, 2) herd_linear_fp8_16(const bf16* x, const u8* weights,
                                                                     const float* scales, float* out, int rows,
                                                                     int inputs, int outputs) {
  linear<Fp8Tiles, 2, 2, kSmallRing>(x, weights, scales, out, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(256) herd_linear_fp8_32(const bf16* x, const u8* weights,
                                                                     const float* scales, float* out, int rows,
                                                                     int inputs, int outputs) {
  linear<Fp8Tiles, 4, 4, kLargeRing>(x, weights, scales, out, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(256) herd_linear_fp8_64(const bf16* x, const u8* weights,
                                                                     const float* scales, float* out, int rows,
                                                                     int inputs, int outputs) {
  linear<Fp8Tiles, 4, 8, kLargeRing>(x, weights, scales, out, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(256) herd_linear_bf16_wide(const bf16* x, const u8* weights,
                                                                       const float* scales, float* out, int rows,
                                                                       int inputs, int outputs) {
  linear_wide<Bf16Tiles>(x, weights, scales, out, rows, inputs, outputs);
}

extern "C" __global__ void __launch_bounds__(256) herd_linear_fp8_wide(const bf16* x, const u8* weights,
                                                                       const float* scales, float* out, int rows,
                                                                       int inputs, int outputs) {
  linear_wide<Fp8Tiles>(x, weights, scales, out, rows, inputs, outputs);
}
