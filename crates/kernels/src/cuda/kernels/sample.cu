// tokens[row] = the token with the largest logit, or with the largest logit / temperature + Gumbel noise.
//
//   logits        [rows, vocab]  f32
//   temperatures  [rows]         f32; 0 or less: no noise
//   seeds         [rows][2]      u32, the lower half first
//   positions     [rows]         u32; of the token that is chosen
//   tokens        [rows]         u32
//
// Launch:  one block of 1024 threads per row.
// Noise:   -ln(-ln u) in f64, u from Philox4x32-10 with key seed and counter (position, token / 4, 0, 0), word token % 4.
//          The device's ln in f64 may differ from the host's in the last bit, so the rounded noise may too, about
//          once in 2^28 draws.
// Ties:    the lowest id. NaN never wins; if nothing is above -inf, token 0.
// Bound:   memory for greedy rows, 4 B per token. With temperature: f64 arithmetic of the tokens that can still win.
// Twin:    sample::choose, without filters.

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;

// No noise lies outside: u is within [2^-24, 1 - 2^-24], so it is within (-2.82, 16.64).
constexpr float kNoiseMin = -2.9f, kNoiseMax = 16.7f;

struct Words {
  u32 at[4];
};

HERD_INLINE Words philox(u32 position, u32 group, u32 key0, u32 key1) {
  constexpr u32 kM0 = 0xd2511f53u, kM1 = 0xcd9e8d57u, kW0 = 0x9e3779b9u, kW1 = 0xbb67ae85u;
  u32 c0 = position, c1 = group, c2 = 0, c3 = 0;
  for (int round = 0; round < 10; round++) {
    const u32 high0 = __umulhi(kM0, c0), low0 = kM0 * c0, high1 = __umulhi(kM1, c2), low1 = kM1 * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += kW0;
    key1 += kW1;
  }
  return Words{{c0, c1, c2, c3}};
}

HERD_INLINE float gumbel(u32 word) {
  // 23 random bits, centred in their cell: never 0 or 1.
  const double uniform = (double(word >> 9) + 0.5) / 8388608.0;
  return float(-log(-log(uniform)));
}

// Over all threads of the block; every thread has the result.
HERD_INLINE Largest largest_of_block(Largest x) {
  __shared__ Largest warps[kWarps];
  x = largest_of_warp(x);
  if (lane_id() == 0) warps[warp_id()] = x;
  __syncthreads();
  x = largest_of_warp(warps[lane_id()]);
  // The next call may write only when all have read.
  __syncthreads();
  return x;
}

// The row's largest logit / divisor. Where all of it is -inf or NaN: token 0 at -inf.
HERD_INLINE Largest largest_scaled(const float* logits, int vocab, float divisor) {
  Largest best = {minus_infinity(), 0};
  for (int column = int(threadIdx.x) * 4; column < vocab; column += kThreads * 4) {
    const Four four = load_4(logits, column, vocab);
    for (int i = 0; i < 4 && column + i < vocab; i++) {
      const float scaled = four.at[i] / divisor;
      if (scaled > best.value) best = Largest{scaled, column + i};
    }
  }
  return largest_of_block(best);
}

// As above, with noise. Tokens that no noise can lift to `bar` are passed over: some token is at or above it.
HERD_INLINE Largest largest_noisy(const float* logits, int vocab, float temperature, float bar, const u32* seed,
                                  u32 position) {
  Largest best = {minus_infinity(), 0};
  for (int column = int(threadIdx.x) * 4; column < vocab; column += kThreads * 4) {
    const Four four = load_4(logits, column, vocab);
    Four scaled;
    bool any = false;
    for (int i = 0; i < 4; i++) {
      scaled.at[i] = four.at[i] / temperature;
      any |= column + i < vocab && scaled.at[i] + kNoiseMax >= bar;
    }
    if (!any) continue;
    const Words words = philox(position, u32(column) / 4, seed[0], seed[1]);
    for (int i = 0; i < 4 && column + i < vocab; i++) {
      if (!(scaled.at[i] + kNoiseMax >= bar)) continue;
      const float noisy = scaled.at[i] + gumbel(words.at[i]);
      if (noisy > best.value) best = Largest{noisy, column + i};
    }
  }
  return largest_of_block(best);
}

extern "C" __global__ void __launch_bounds__(1024) herd_sample(const float* logits, int vocab, const float* temperatures,
                                                               const u32* seeds, const u32* positions, u32* tokens) {
  const int row = int(blockIdx.x);
  const float temperature = temperatures[row];
  logits += size_t(row) * vocab;
  // x / 1 is x.
  const bool greedy = temperature <= 0.0f;
  Largest best = largest_scaled(logits, vocab, greedy ? 1.0f : temperature);
  if (!greedy) {
    const float bar = best.value + kNoiseMin;
    best = largest_noisy(logits, vocab, temperature, bar, seeds + 2 * row, positions[row]);
  }
  if (threadIdx.x == 0) tokens[row] = u32(best.id);
}
