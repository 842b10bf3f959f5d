// Which rows of which rank each local expert works on, grouped by its slot: of one slot by source, then by row.
//
//   sources      [sources_len]   of every rank: its rows of this step, the expert that each wants, and who serves it
//   layer, me                    the MoE layer, and this rank
//   offsets      [slots + 1]     u32: where a slot's rows begin in `order`
//   order        [rows_max]      source and row; only the first offsets[slots] are written. Rows past rows_max are
//                                passed over: what other ranks claim must not lead out of this memory
//   served       [slots]         u32: how many rows a slot has; or null
//   unserved     [1]             u32: the first row that wants an expert that there is not, or that this rank has not
//                                though it should; stays as it is without one; or null
//
// Launch:  one block per slot, of as many warps as the rows fill, at most 32. Each counts the rows of earlier slots for
//          itself, so none waits for another; there is nothing atomic about it.
// Bound:   latency, 2 passes over all rows: some 4 us for 512 rows, 30 us for 16384.
// Twin:    `Routes::target` of the exchange, in a test.

constexpr int kWarps = 32;
constexpr int kSourcesMax = 64;

using Source = SourceOf<u8>;

// 2^32 / the golden ratio: however few rows there are, each target gets about its part of them.
constexpr u32 kStride = 0x9e3779b9u;

constexpr u32 kElsewhere = 0xffffffffu, kNowhere = 0xfffffffeu;

HERD_INLINE u32 slot_of(const Source& source, u32 row, u32 layer, u32 me) {
  const u32 expert = source.wanted[row];
  if (source.experts <= expert) return kNowhere;
  const Span span = source.spans[size_t(layer) * source.experts + expert];
  const u32 point = source.start + row * kStride;
  const Target* at = source.targets + span.first;
  const Target* last = at + span.count - 1;
  while (at < last && at->until <= point) at++;
  const Target target = *at;
  return target.rank == me ? u32(target.slot) : kElsewhere;
}

// *to = a source. As parameters of a kernel they are copied when it is enqueued; a copy of pageable memory might make the
// host wait for the stream.
extern "C" __global__ void herd_put_source(Source* to, const u16* wanted, const u8* rows, u8* results,
                                           const Span* spans, const Target* targets, u32 count, u32 experts,
                                           u32 start) {
  *to = Source{wanted, rows, results, spans, targets, count, experts, start};
}

// Sum over the warp's lanes, for all of them.
HERD_INLINE u32 sum_warp(u32 x) {
  for (int width = kWarp / 2; width > 0; width /= 2) x += __shfl_xor_sync(kAll, x, width);
  return x;
}

extern "C" __global__ void __launch_bounds__(1024) herd_dispatch(const Source* sources, int sources_len, u32 layer,
                                                                 u32 me, u32* offsets, RowOfSource* order,
                                                                 u32 rows_max, u32* served, u32* unserved) {
  __shared__ u32 starts[kSourcesMax + 1];
  __shared__ u32 earlier_of[kWarps], mine_of[kWarps];
  const u32 slot = blockIdx.x;
  const int lane = lane_id(), warp = warp_id();
  if (threadIdx.x < kWarps) earlier_of[threadIdx.x] = mine_of[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    starts[0] = 0;
    for (int i = 0; i < sources_len; i++) starts[i + 1] = starts[i] + min(sources[i].count, rows_max - starts[i]);
  }
  __syncthreads();
  // Rows of all sources in a line; a warp's share is a run of it, a multiple of 32.
  const u32 all = starts[sources_len];
  const u32 share = (all + blockDim.x - 1) / blockDim.x * kWarp;
  const u32 begin = min(share * warp, all), end = min(begin + share, all);
  auto find = [&](u32 at, RowOfSource& found) {
    if (end <= at) return kElsewhere;
    int source = 0;
    while (starts[source + 1] <= at) source++;
    found = {u32(source), at - starts[source]};
    return slot_of(sources[source], found.row, layer, me);
  };
  RowOfSource found{};
  u32 earlier = 0, mine = 0;
  for (u32 at = begin + lane; at < end; at += kWarp) {
    const u32 of_row = find(at, found);
    earlier += of_row < slot;
    mine += of_row == slot;
    // The minimum of integers is the same in any order.
    const bool is_nowhere = of_row != kElsewhere && gridDim.x <= of_row;
    if (is_nowhere && slot == 0 && unserved != nullptr) atomicMin(unserved, found.row);
  }
  earlier = sum_warp(earlier);
  mine = sum_warp(mine);
  if (lane == 0) {
    earlier_of[warp] = earlier;
    mine_of[warp] = mine;
  }
  __syncthreads();
  const u32 first = sum_warp(earlier_of[lane]);
  const u32 last = first + sum_warp(mine_of[lane]);
  u32 to = first + sum_warp(lane < warp ? mine_of[lane] : 0);
  if (threadIdx.x == 0) {
    offsets[slot] = first;
    if (slot + 1 == gridDim.x) offsets[slot + 1] = last;
    if (served != nullptr) served[slot] = last - first;
  }
  for (u32 base = begin; base < end; base += kWarp) {
    const bool is_mine = find(base + lane, found) == slot;
    const u32 votes = __ballot_sync(kAll, is_mine);
    if (is_mine) order[to + __popc(votes & ((1u << lane) - 1))] = found;
    to += __popc(votes);
  }
}
