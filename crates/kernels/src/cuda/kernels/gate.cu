// experts[row] = the expert with the largest logit, scores[row] = the sigmoid of that logit.
//
//   logits   [rows, count]  f32
//   experts  [rows]         u16
//   scores   [rows]         f32
//
// Launch:  4 rows per block, one warp each.
// Ties:    the lowest id. NaN never wins over an expert before it: a row that begins with NaN takes expert 0, as the
//          CPU does.
// Bound:   latency.
// Twin:    gate::top1; equal bit for bit.

constexpr int kRows = 4;

extern "C" __global__ void herd_gate(const float* logits, int count, int rows, u16* experts, float* scores) {
  const int row = int(blockIdx.x) * kRows + warp_id();
  if (row >= rows) return;
  logits += size_t(row) * count;
  const float first = logits[0];
  // A lane without a number offers expert 0 at -inf: what the row's first expert would have to beat.
  Largest best = {minus_infinity(), 0};
  for (int id = lane_id(); id < count; id += kWarp) {
    if (logits[id] > best.value) best = Largest{logits[id], id};
  }
  best = largest_of_warp(best);
  if (first != first) best = Largest{first, 0};
  if (lane_id() == 0) {
    experts[row] = u16(best.id);
    scores[row] = sigmoid(best.value);
  }
}
