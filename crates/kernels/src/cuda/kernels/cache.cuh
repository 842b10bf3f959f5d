// Where the elements of a position lie in a block of the KV cache of one head.
//
//   f32:  K [head_dim][16], then V [16][head_dim]
//   bf16: K [16][head_dim], then V [head_dim][16]

constexpr int kBlock = 16;

// One element of k or v.
HERD_INLINE size_t key_at(const float*, int slot, int i, int) { return size_t(i) * kBlock + slot; }
HERD_INLINE size_t value_at(const float*, int slot, int i, int head_dim) { return size_t(slot) * head_dim + i; }
HERD_INLINE size_t key_at(const bf16*, int slot, int i, int head_dim) { return size_t(slot) * head_dim + i; }
HERD_INLINE size_t value_at(const bf16*, int slot, int i, int) { return size_t(i) * kBlock + slot; }
