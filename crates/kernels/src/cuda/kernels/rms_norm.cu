// out[row, :] = x[row, :] / sqrt(mean(x[row, :]^2) + eps) * weight; with `y`, x += y first (the residual).
//
//   x       [rows, hidden]  f32; overwritten if `y` is given
//   y       [rows, hidden]  f32, or null
//   weight  [hidden]        f32
//   out     [rows, hidden]  f32, or bf16: then the normalised row is rounded before the weight and after it
//
// Launch:  one block of 256 threads per row.
// Order:   squares are summed in `chains` interleaved chains (a power of two, at most 256) and a fixed tree. 16
//          chains are the order of the CPU.
// Bound:   memory, 12 to 16 B per element; latency at few rows.
// Twin:    norm::rms_norm; equal bit for bit with 16 chains.

constexpr int kThreads = 256;

template <class Out>
HERD_INLINE void rms_norm_row(float* x, const float* y, const float* weight, float eps, Out* out, int hidden,
                              int chains) {
  __shared__ float sums[kThreads];
  const int thread = int(threadIdx.x);
  const size_t at = size_t(blockIdx.x) * hidden;
  x += at;
  out += at;
  if (y != nullptr) {
    // The same thread reads these elements back below only where it wrote them, or after the barrier.
    for (int i = thread; i < hidden; i += kThreads) x[i] += y[at + i];
    __syncthreads();
  }
  float sum = 0.0f;
  if (thread < chains) {
    for (int i = thread; i < hidden; i += chains) sum = fmaf(x[i], x[i], sum);
  }
  sums[thread] = sum;
  __syncthreads();
  for (int width = chains / 2; width > 0; width /= 2) {
    if (thread < width) sums[thread] += sums[thread + width];
    __syncthreads();
  }
  const float scale = 1.0f / sqrtf(sums[0] / float(hidden) + eps);
  for (int i = thread; i < hidden; i += kThreads) {
    Out normalised;
    narrow(x[i] * scale, &normalised);
    narrow(widen(normalised) * weight[i], &out[i]);
  }
}

extern "C" __global__ void herd_rms_norm_f32(float* x, const float* y, const float* weight, float eps, float* out,
                                             int hidden, int chains) {
  rms_norm_row(x, y, weight, eps, out, hidden, chains);
}

extern "C" __global__ void herd_rms_norm_bf16(float* x, const float* y, const float* weight, float eps, bf16* out,
                                              int hidden, int chains) {
  rms_norm_row(x, y, weight, eps, out, hidden, chains);
}
