// What every kernel of herd begins with: types, rounding, elementary functions, warp operations.
//
// Compiled by NVRTC without any header (a machine needs the driver and libnvrtc, no toolkit), with fused
// multiply-adds only where `fmaf` is written (`--fmad=false`), so the same source gives the same bits on
// every architecture that has the same instructions. Emulated on a CPU by `emulator/emulator.hpp`.
//
// Law of this folder: a row of any result depends on that row's operands alone, bit for bit. Every reduction
// has one order that knows nothing of the number of rows.

#ifndef HERD_EMULATED
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
// Memory whose size the launch gives.
#define HERD_DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]
#define HERD_INLINE __device__ __forceinline__
#endif

constexpr int kWarp = 32;
constexpr u32 kAll = 0xffffffffu;

// Bits of a bf16. A type of its own, so that no integer is taken for one.
struct bf16 {
  u16 bits;
};

HERD_INLINE float widen(float x) { return x; }

HERD_INLINE float widen(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

// Nearest bf16, ties to even. Keeps NaN a NaN.
HERD_INLINE bf16 to_bf16(float x) {
  const u32 bits = __float_as_uint(x);
  const u32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const u32 quiet = bits | 0x00400000u;
  return bf16{u16((x != x ? quiet : rounded) >> 16)};
}

HERD_INLINE void narrow(float x, float* to) { *to = x; }

HERD_INLINE void narrow(float x, bf16* to) { *to = to_bf16(x); }

// As `to_bf16`, two at once: the lower half is the first. A NaN need not keep its bits.
HERD_INLINE u32 to_bf16x2(float low, float high) {
#ifdef HERD_EMULATED
  return u32(to_bf16(low).bits) | u32(to_bf16(high).bits) << 16;
#else
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#endif
}

// e^x for every finite x and -inf; relative error below 2e-7. The operations of `math::exp` in the crate, so that
// device and host agree bit for bit: Cody-Waite reduction, the polynomial of Cephes' expf, scaling by 2^n.
HERD_INLINE float exp_fixed(float x) {
  constexpr float kMin = -87.0f, kMax = 88.0f, kRound = 12582912.0f;
  float clamped = x > kMin ? x : kMin;
  clamped = clamped < kMax ? clamped : kMax;
  const float n = fmaf(clamped, 1.44269504088896340736f, kRound) - kRound;
  float r = fmaf(-n, 0.6933594f, clamped);
  r = fmaf(-n, -2.1219444e-4f, r);
  float p = 1.9875691e-4f;
  p = fmaf(p, r, 1.3981999e-3f);
  p = fmaf(p, r, 8.333452e-3f);
  p = fmaf(p, r, 4.1665796e-2f);
  p = fmaf(p, r, 1.6666665e-1f);
  p = fmaf(p, r, 5e-1f);
  const float y = fmaf(p, r * r, r) + 1.0f;
  const float scale = __uint_as_float(u32(n + 127.0f) << 23);
  return x < kMin ? 0.0f : y * scale;
}

// 1 / (1 + e^-x).
HERD_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_fixed(-x)); }

HERD_INLINE float minus_infinity() { return __uint_as_float(0xff800000u); }

HERD_INLINE int lane_id() { return int(threadIdx.x) % kWarp; }

HERD_INLINE int warp_id() { return int(threadIdx.x) / kWarp; }

// Sum over 16 neighbouring lanes as the fixed tree of `math::sum_lanes`: lane i takes lane i + 8, then + 4, ….
// Every one of the 16 lanes has the sum afterwards: a + b and b + a are the same bits.
HERD_INLINE float sum_16(float x) {
  for (int width = 8; width > 0; width /= 2) x += __shfl_xor_sync(kAll, x, width);
  return x;
}

// Four neighbours of a row.
struct Four {
  float at[4];
};

// Elements `column..column + 4` of a row of `columns`, widened; 0 past its end. In one access where all rows are
// aligned to it: a row starts at a multiple of `columns` elements from a buffer's start.
HERD_INLINE Four load_4(const float* row, int column, int columns) {
  if (columns % 4 == 0) {
    const float4 x = *reinterpret_cast<const float4*>(row + column);
    return Four{{x.x, x.y, x.z, x.w}};
  }
  Four x = {};
  for (int i = 0; i < 4 && column + i < columns; i++) x.at[i] = row[column + i];
  return x;
}

HERD_INLINE Four load_4(const bf16* row, int column, int columns) {
  Four x = {};
  if (columns % 4 == 0) {
    const uint2 pairs = *reinterpret_cast<const uint2*>(row + column);
    x.at[0] = __uint_as_float(pairs.x << 16);
    x.at[1] = __uint_as_float(pairs.x & 0xffff0000u);
    x.at[2] = __uint_as_float(pairs.y << 16);
    x.at[3] = __uint_as_float(pairs.y & 0xffff0000u);
    return x;
  }
  for (int i = 0; i < 4 && column + i < columns; i++) x.at[i] = widen(row[column + i]);
  return x;
}

// The counterparts; nothing is written past the row's end.
HERD_INLINE void store_4(const Four& x, float* row, int column, int columns) {
  if (columns % 4 == 0) {
    *reinterpret_cast<float4*>(row + column) = float4{x.at[0], x.at[1], x.at[2], x.at[3]};
    return;
  }
  for (int i = 0; i < 4 && column + i < columns; i++) row[column + i] = x.at[i];
}

HERD_INLINE void store_4(const Four& x, bf16* row, int column, int columns) {
  if (columns % 4 == 0) {
    *reinterpret_cast<uint2*>(row + column) = uint2{to_bf16x2(x.at[0], x.at[1]), to_bf16x2(x.at[2], x.at[3])};
    return;
  }
  for (int i = 0; i < 4 && column + i < columns; i++) row[column + i] = to_bf16(x.at[i]);
}

// A candidate for the largest of some values.
struct Largest {
  float value;
  int id;
};

// The larger one; of equal ones that with the lower id. The order of comparisons does not matter, as none is NaN.
HERD_INLINE Largest larger(Largest a, Largest b) {
  const bool second = b.value > a.value || (b.value == a.value && b.id < a.id);
  return second ? b : a;
}

// Over all lanes of the warp; every lane has the result.
HERD_INLINE Largest largest_of_warp(Largest x) {
  for (int width = kWarp / 2; width > 0; width /= 2) {
    Largest other;
    other.value = __shfl_xor_sync(kAll, x.value, width);
    other.id = __shfl_xor_sync(kAll, x.id, width);
    x = larger(x, other);
  }
  return x;
}

#ifndef HERD_EMULATED
// d += a * b on the tensor cores: a is 16 x 16 (row-major), b 16 x 8 (column-major), both bf16; d is 16 x 8 in f32.
// Which lane holds what: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
HERD_INLINE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes that are read once: they need not stay in the cache.
HERD_INLINE uint4 load_once(const void* from) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

// Starts a copy of 16 bytes into shared memory, or of as many zeros if there is nothing there: then `from` is not
// read. The thread that copies sees the bytes after its `copy_wait`, others after a barrier behind it.
HERD_INLINE void copy_async(void* to, const void* from, bool is_there) {
  const u32 address = u32(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(from), "r"(is_there ? 16 : 0)
               : "memory");
}

// Ends a group of copies.
HERD_INLINE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies but those of the last `kGroups` groups.
template <int kGroups>
HERD_INLINE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Two products of bf16 pairs, each rounded once.
HERD_INLINE u32 mul_bf16x2(u32 a, u32 b) {
  u32 d;
  // + -0 changes no product, not even one that is -0.
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
  return d;
}
#endif

// 16 bytes that others read, too.
HERD_INLINE uint4 load_16(const void* from) { return *static_cast<const uint4*>(from); }

// Two e4m3fn bytes as a pair of bf16, exactly; not for NaN. Sign, exponent and mantissa move to their places in a bf16,
// whose exponent then is 120 too small: also where e4m3 is subnormal, for then the bf16 is, too.
HERD_INLINE u32 e4m3x2_to_bf16x2(u32 low, u32 high) {
  const u32 placed = (low & 0x80u) << 8 | (low & 0x7fu) << 4 | (high & 0x80u) << 24 | (high & 0x7fu) << 20;
  return mul_bf16x2(placed, 0x7b807b80u);  // 2^120
}
