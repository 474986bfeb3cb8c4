// Certified greedy head on one GPU, CUDA C++, for batch 1..32. Compiled once a configuration with
//   -DD= hidden size   -DGROUPS= coded groups of 16 dimensions   -DWORDS= base words a row
//   -DNT= queries / 8  -DNW= warps a block  -DCG= chunks a load group  -DMETA= 0 | 1 (row numbers inside
//   the block of codes)  -DSAMPLE= 0 | 1  -DLOGITS= 0 | 1  -DEVICT= 0 | 1
//   -DDEPTH= stages of a warp's ring  -DREGS= registers of the scan  -DSW= warps of the other two kernels
//   -DQD= steps of the query kernel whose loads travel together   -DONE= 1: one query only, products of bit planes
//   -DPILOT= 1 (with ONE): one more warp scores the best row of the block after 3/4 of its tiles, not at the end
//   -DDIRECT= 1: no last block; the caller reads the row from the low half of `best`   -DT8= 1: int8 transform with row scales
// A chunk is 8 words = 128 codes with one int8 query scale: the k of one m16n8k32 product by field.
// No header is included, so that a run-time compiler needs no include path.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

#define NQ (8 * NT)
#define NCH ((WORDS + 7) / 8)
#define NGR ((NCH + CG - 1) / CG)
#define NCHP (NGR * CG)
#define RCH ((GROUPS + 7) / 8)
#define ALLCH (NCH + RCH)
#define REFW ((GROUPS + 3) / 4 * 4)
#define D8 (D / 8)
#define BSTRIDE ((WORDS + 2 * META) * 4)
#define MAGIC 0x4B400000
#define MAGICF 12582912.0f
#define NEG (-3.0e38f)

__device__ __forceinline__ float bf(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float bfh(u32 x) { return __uint_as_float(x & 0xffff0000u); }
__device__ __forceinline__ u32 ordered(float f) {
  u32 b = __float_as_uint(f);
  return b & 0x80000000u ? ~b : b | 0x80000000u;
}
__device__ __forceinline__ float unordered(u32 b) {
  return __uint_as_float(b & 0x80000000u ? b & 0x7fffffffu : ~b);
}
#if DIRECT
#define ROW_BITS(row) (row)
#else
#define ROW_BITS(row) (0xffffffffu - (row))  // of equal logits the lowest row wins
#endif
#define TW (NW + PILOT)
__device__ __forceinline__ u64 packed(float value, u32 row) { return ((u64)ordered(value) << 32) | ROW_BITS(row); }
__device__ __forceinline__ void pdl_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void pdl_launch() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ uint4 load_codes(const uint4* p) {
  uint4 v;
#if EVICT
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p), "l"(policy));
#else
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
#endif
  return v;
}
__device__ __forceinline__ void mma_s8(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The first product of a chain: every sum starts at MAGIC, whose bits read as a float are 12582912 + sum.
__device__ __forceinline__ void mma_s8_first(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, int m) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
               : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(m));
}
__device__ __forceinline__ void mma_bf16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Sums of and-ed bits; column n of b is bit plane n of the query. Even columns start at MAGIC, odd ones at 0.
__device__ __forceinline__ void mma_b1_more(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_b1(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, int m) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%10,%11};"
               : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(m), "r"(0));
}
// Philox4x32-10: four uniform words for rows 4i..4i+3 of a query at a step.
__device__ __forceinline__ uint4 philox(u32 c0, u32 c1, u32 k0, u32 k1) {
  u32 c2 = 0, c3 = 0;
#pragma unroll
  for (int i = 0; i < 10; i++) {
    u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    u32 h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0; c1 = l1; c2 = h0 ^ c3 ^ k1; c3 = l0;
    k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}
__device__ __forceinline__ float gumbel(u32 x) {
  float u = ((float)(x >> 8) + 0.5f) * (1.0f / 16777216.0f);
  return -__logf(-__logf(u));
}

struct Args {
  // index
  const uint4* base; const u16* scale; const u16* error; const u16* error_refined; const float* direction;
  const uint4* refine; const uint4* transform; const float* exact; const uint4* weight; const float* transform_scale;
  const int* word_group; const float* word_gain; const float* share_base; const float* share_refined;
  // query and its parts
  const u16* hidden; float* coded; float* group_energy; float* along_shift; u32* qdump;
  // between scan and selection
  float* upper; float* bmax; u64* top; u64* best; int* done; u32* barrier;
  // out
  long long* token; float* logit; int* stats;
  int B, V, nblk, P, refine_min; float z, mean_error, inv_temp; u32 seed, step;
};

extern __shared__ uint4 smem4[];

// Four int8 to two pairs of bf16.
__device__ __forceinline__ void widen(u32 w, u32& low, u32& high) {
  float f[4];
#pragma unroll
  for (int i = 0; i < 4; i++) f[i] = (float)(signed char)(w >> 8 * i);
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(f[1]), "f"(f[0]));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(f[3]), "f"(f[2]));
}

// 1. coded = transform h by groups of 16 rows, energies of the groups; blocks from GROUPS on: h along the exact directions.
template <int W> __device__ void query_phase(const Args& a, int g, char* smem) {
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, gg = lane >> 2, t = lane & 3;
  float* red = (float*)smem;                    // [W][16][NQ]
#if DIRECT
  if (g == 0 && tid < a.B) { a.best[tid] = 0; a.top[tid] = 0; }
#endif
  if (g >= GROUPS) {
    const int n = g - GROUPS;
    const uint2* h = (const uint2*)(a.hidden + (size_t)n * D);
    float sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < (D / 4 + W * 32 - 1) / (W * 32); i++) {
      int j = tid + i * W * 32;
      if (j < D / 4) {
        uint2 x = __ldg(h + j);
#pragma unroll
        for (int k = 0; k < 2; k++) {
          float4 e = __ldg((const float4*)(a.exact + k * D) + j);
          sum[k] += bf(x.x) * e.x + bfh(x.x) * e.y + bf(x.y) * e.z + bfh(x.y) * e.w;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
      for (int s = 16; s; s >>= 1) sum[k] += __shfl_xor_sync(~0u, sum[k], s);
      if (!lane) red[k * W + warp] = sum[k];
    }
    __syncthreads();
    if (tid < 2) {
      float s = 0;
      for (int w = 0; w < W; w++) s += red[tid * W + w];
      a.along_shift[tid * NQ + n] = s;
    }
    return;
  }
  float c[NT][4];
#pragma unroll
  for (int nt = 0; nt < NT; nt++) c[nt][0] = c[nt][1] = c[nt][2] = c[nt][3] = 0;
#if T8
  const uint4* t0 = a.transform + (size_t)(16 * g + gg) * (D / 16) + t;
  const uint4* t1 = t0 + 8 * (D / 16);
  const uint4* h = (const uint4*)a.hidden;
  constexpr int STEPS = (D / 64 + W - 1) / W, DEEP = STEPS < QD / 2 ? STEPS : QD / 2;
#pragma unroll
  for (int i0 = 0; i0 < STEPS; i0 += DEEP) {
    uint4 x[DEEP], y[DEEP], b[DEEP][NT][2];
#pragma unroll
    for (int i = 0; i < DEEP; i++) {
      const int ks = warp + (i0 + i) * W;
      const bool in = ((D / 64) % W == 0 && STEPS % DEEP == 0) || ks < D / 64;
      x[i] = in ? load_codes(t0 + ks * 4) : make_uint4(0, 0, 0, 0);
      y[i] = in ? load_codes(t1 + ks * 4) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int nt = 0; nt < NT; nt++)
#pragma unroll
        for (int k = 0; k < 2; k++)
          b[i][nt][k] = in && nt * 8 + gg < a.B ? load_codes(h + (nt * 8 + gg) * D8 + ks * 8 + t * 2 + k) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < DEEP; i++) {
      const u32 xs[4] = {x[i].x, x[i].y, x[i].z, x[i].w}, ys[4] = {y[i].x, y[i].y, y[i].z, y[i].w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        u32 x0, x1, y0, y1;
        widen(xs[j], x0, x1);
        widen(ys[j], y0, y1);
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
          const uint4 q = b[i][nt][j >> 1];
          mma_bf16(c[nt], x0, y0, x1, y1, j & 1 ? q.z : q.x, j & 1 ? q.w : q.y);
        }
      }
    }
  }
#else
  const uint4* t0 = a.transform + (size_t)(16 * g + gg) * D8 + t;
  const uint4* t1 = t0 + 8 * D8;
  const uint4* h = (const uint4*)a.hidden;
  constexpr int STEPS = (D / 32 + W - 1) / W;
  constexpr int DEEP = STEPS < QD ? STEPS : QD;  // steps whose loads travel together
#pragma unroll
  for (int i0 = 0; i0 < STEPS; i0 += DEEP) {
    uint4 x[DEEP], y[DEEP], b[DEEP][NT];
#pragma unroll
    for (int i = 0; i < DEEP; i++) {
      const int ks = warp + (i0 + i) * W;
      const bool in = ((D / 32) % W == 0 && STEPS % DEEP == 0) || ks < D / 32;
      x[i] = in ? load_codes(t0 + ks * 4) : make_uint4(0, 0, 0, 0);
      y[i] = in ? load_codes(t1 + ks * 4) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        const int n = nt * 8 + gg;
        b[i][nt] = in && n < a.B ? load_codes(h + n * D8 + ks * 4 + t) : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int i = 0; i < DEEP; i++)
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        mma_bf16(c[nt], x[i].x, y[i].x, x[i].y, y[i].y, b[i][nt].x, b[i][nt].y);
        mma_bf16(c[nt], x[i].z, y[i].z, x[i].w, y[i].w, b[i][nt].z, b[i][nt].w);
      }
  }
#endif
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    float* r = red + warp * 16 * NQ + nt * 8 + 2 * t;
    r[gg * NQ] = c[nt][0]; r[gg * NQ + 1] = c[nt][1];
    r[(gg + 8) * NQ] = c[nt][2]; r[(gg + 8) * NQ + 1] = c[nt][3];
  }
  __syncthreads();
  for (int i = tid; i < 16 * NQ; i += W * 32) {  // i = n * 16 + row
    const int n = i >> 4, row = i & 15;
    float s = 0;
#pragma unroll
    for (int w = 0; w < W; w++) s += red[w * 16 * NQ + row * NQ + n];
#if T8
    s *= a.transform_scale[g * 16 + row];
#endif
    float e = s * s;
    for (int x = 8; x; x >>= 1) e += __shfl_xor_sync(~0u, e, x);
    if (n < a.B) {
      a.coded[n * (GROUPS * 16) + g * 16 + row] = s;
      if (row == 0) a.group_energy[n * GROUPS + g] = e;
    }
  }
}

// int8 of 128 coordinates by a warp: lane = word * 4 + field.
__device__ __forceinline__ u32 quantise(float4 v, float gain, float& step, int& sum) {
  v.x *= gain; v.y *= gain; v.z *= gain; v.w *= gain;
  float peak = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
  peak = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(peak)));
  step = fmaxf(peak / 127.0f, 1e-30f);
  const float inverse = 127.0f / fmaxf(peak, 1e-28f);
  int q0 = __float2int_rn(v.x * inverse), q1 = __float2int_rn(v.y * inverse);
  int q2 = __float2int_rn(v.z * inverse), q3 = __float2int_rn(v.w * inverse);
  sum = __reduce_add_sync(~0u, q0 + q1 + q2 + q3);
  return (q0 & 255) | (q1 & 255) << 8 | (q2 & 255) << 16 | (u32)q3 << 24;
}
__device__ __forceinline__ float warp_sum(float v) {
  for (int s = 16; s; s >>= 1) v += __shfl_xor_sync(~0u, v, s);
  return v;
}

// 2. scan. Every warp streams its tiles of 32 rows (two blocks) through a ring of its own in shared memory, a chunk group a
// stage, filled by bulk copies that start before the query is known. Shared: qfrag [NCHP][4][NT][32] uint2, scales and offsets [NGR][NQ],
// params [5][NQ], lower [NQ], win [NW][NQ], tables, barriers [NW][DEPTH], rings [NW][DEPTH][STAGE]. A load group of chunks
// shares one int8 scale of the query, so that its sums stay integers.
#define S_Q 0
#define S_SC (NCHP * 4 * NT * 32 * 8)
#define S_OFF (S_SC + NGR * NQ * 4)
#define S_PAR (S_OFF + NGR * NQ * 4)
#define S_LOW (S_PAR + 6 * NQ * 4)
#define S_WIN (S_LOW + NQ * 4)
#define S_TAB (S_WIN + NW * NQ * 8)
#define S_BAR (S_TAB + NCHP * 8 * 8)
#define S_RING ((S_BAR + NW * DEPTH * 8 + 127) / 128 * 128)
#define STB (CG * 512 + 128)
#define STAGE (2 * STB)
#define S_SCAN_END (S_RING + NW * DEPTH * STAGE)
#define EPL ((GROUPS + 31) / 32)
#define LASTW (WORDS - (NGR - 1) * CG * 8)  // words of the last group

struct Meta { uint2 scale, error; float4 direction; };

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
#if EVICT
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               :: "r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
#endif
}
__device__ __forceinline__ void wait_stage(u32 barrier, u32 parity) {
  u32 done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  } while (!done);
}
// One lane: fill a stage with group `grp` of a tile.
__device__ __forceinline__ void fill_stage(const Args& a, u32 stage, u32 barrier, int tile, int grp) {
  const bool last = grp == NGR - 1;
  const u32 words = last ? LASTW : CG * 8;
  const u32 bytes = words * 64 + (META && last ? 128 : 0);
  const bool two = 2 * tile + 1 < a.nblk;
  u32 all = two ? 2 * bytes : bytes;
  if (!META && last) all += two ? 256 : 128;
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(all) : "memory");
  const uint4* from = a.base + (size_t)(2 * tile) * BSTRIDE + grp * (CG * 32);
  bulk_copy(stage, from, bytes, barrier);
  if (two) bulk_copy(stage + STB, from + BSTRIDE, bytes, barrier);
#if !META
  if (last) {
    bulk_copy(stage + CG * 512, a.scale + tile * 32, two ? 64 : 32, barrier);
    bulk_copy(stage + CG * 512 + 64, a.error + tile * 32, two ? 64 : 32, barrier);
    bulk_copy(stage + STB + CG * 512, a.direction + tile * 32, two ? 128 : 64, barrier);
  }
#endif
}
__device__ __forceinline__ Meta read_meta(const char* stage) {
  const int lane = threadIdx.x & 31, half = lane >> 4, sub = (lane >> 2) & 3;
  Meta m;
#if META
  const char* p = stage + half * STB + LASTW * 64;
  m.scale = *(const uint2*)(p + sub * 8); m.error = *(const uint2*)(p + 32 + sub * 8);
  m.direction = *(const float4*)(p + 64 + sub * 16);
#else
  m.scale = *(const uint2*)(stage + CG * 512 + half * 32 + sub * 8);
  m.error = *(const uint2*)(stage + CG * 512 + 64 + half * 32 + sub * 8);
  m.direction = *(const float4*)(stage + STB + CG * 512 + half * 64 + sub * 16);
#endif
  return m;
}

__device__ float exact_dot(const Args& a, int row, const uint4* h) {
  const int lane = threadIdx.x & 31;
  constexpr int IT = (D8 + 31) / 32;
  uint4 w[IT];
#pragma unroll
  for (int i = 0; i < IT; i++)
    if (D8 % 32 == 0 || i * 32 + lane < D8) w[i] = __ldg(a.weight + (size_t)row * D8 + i * 32 + lane);
  float s0 = 0, s1 = 0;
#pragma unroll
  for (int i = 0; i < IT; i++)
    if (D8 % 32 == 0 || i * 32 + lane < D8) {
      uint4 y = h[i * 32 + lane];
      s0 += bf(w[i].x) * bf(y.x); s1 += bfh(w[i].x) * bfh(y.x);
      s0 += bf(w[i].y) * bf(y.y); s1 += bfh(w[i].y) * bfh(y.y);
      s0 += bf(w[i].z) * bf(y.z); s1 += bfh(w[i].z) * bfh(y.z);
      s0 += bf(w[i].w) * bf(y.w); s1 += bfh(w[i].w) * bfh(y.w);
    }
  return warp_sum(s0 + s1);
}
__device__ float noisy(const Args& a, float logit, int n, int row) {
#if SAMPLE
  uint4 r = philox(row >> 2, a.step * NQ + n, a.seed, 0);
  u32 x = (row & 3) == 0 ? r.x : (row & 3) == 1 ? r.y : (row & 3) == 2 ? r.z : r.w;
  return logit * a.inv_temp + gumbel(x);
#else
  return logit;
#endif
}

// What does not need the query: the first codes, zeros in shared memory, tables.
struct Early { float share[EPL]; };
__device__ __forceinline__ void scan_early(const Args& a, char* smem, Early& e) {
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int tiles = (a.nblk + 1) / 2, stride = gridDim.x * NW;
  if (lane == 0 && warp < NW) {
    const u32 barriers = shared_address(smem + S_BAR) + warp * DEPTH * 8, ring = shared_address(smem + S_RING) + warp * DEPTH * STAGE;
    for (int i = 0; i < DEPTH; i++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(barriers + i * 8) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    for (int i = 0; i < DEPTH; i++) {
      int tile = blockIdx.x * NW + warp + i / NGR * stride;
      if (tile < tiles) fill_stage(a, ring + i * STAGE, barriers + i * 8, tile, i % NGR);
    }
  }
  for (int i = tid; i < NCHP * 8; i += TW * 32) {
    ((int*)(smem + S_TAB))[i] = i < NCH * 8 ? a.word_group[i] : -1;
    ((float*)(smem + S_TAB))[NCHP * 8 + i] = i < NCH * 8 ? a.word_gain[i] : 0;
  }
#pragma unroll
  for (int i = 0; i < EPL; i++) e.share[i] = i * 32 + lane < GROUPS ? a.share_base[i * 32 + lane] : 0;
  for (int i = tid; i < S_PAR / 16; i += TW * 32) ((uint4*)smem)[i] = make_uint4(0, 0, 0, 0);
  if (tid < NQ) {
    ((u32*)(smem + S_LOW))[tid] = ordered(NEG);
#pragma unroll
    for (int i = 0; i < 5; i++) ((float*)(smem + S_PAR))[i * NQ + tid] = 0;
  }
  __syncthreads();
}

__device__ void scan_phase(const Args& a, char* smem, Early& early) {
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3, sub = g & 3;
  uint2* q = (uint2*)(smem + S_Q);
  float* sc = (float*)(smem + S_SC);
  float* off = (float*)(smem + S_OFF);
  float* par = (float*)(smem + S_PAR);
  u32* low = (u32*)(smem + S_LOW);
  u64* win = (u64*)(smem + S_WIN);
  const int* group_of = (const int*)(smem + S_TAB) + (lane >> 2);
  const float* gain_of = (const float*)(smem + S_TAB) + NCHP * 8 + (lane >> 2);
  float4 v[CG], w[CG];
  auto fetch = [&](float4* to, int task) {
    const int u = task % NGR, n = task / NGR;
#pragma unroll
    for (int i = 0; i < CG; i++) {
      const int group = group_of[(u * CG + i) * 8];
      to[i] = group >= 0 ? __ldcg((const float4*)(a.coded + n * (GROUPS * 16) + group * 16 + t * 4)) : make_float4(0, 0, 0, 0);
    }
  };
  if (warp < NGR * a.B) fetch(w, warp);
  for (int task = warp; task < NGR * a.B; task += TW) {
    const int u = task % NGR, n = task / NGR;
    float peak = 0;
#pragma unroll
    for (int i = 0; i < CG; i++) {
      const float gain = gain_of[(u * CG + i) * 8];
      v[i] = make_float4(w[i].x * gain, w[i].y * gain, w[i].z * gain, w[i].w * gain);
      peak = fmaxf(peak, fmaxf(fmaxf(fabsf(v[i].x), fabsf(v[i].y)), fmaxf(fabsf(v[i].z), fabsf(v[i].w))));
    }
    if (task + TW < NGR * a.B) fetch(w, task + TW);
    peak = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(peak)));
    const float step = fmaxf(peak / 127.0f, 1e-30f), inverse = 127.0f / fmaxf(peak, 1e-28f);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < CG; i++) {
      const int c = u * CG + i;
      const u32 word = (__float2int_rn(v[i].x * inverse) & 255) | (__float2int_rn(v[i].y * inverse) & 255) << 8 |
                       (__float2int_rn(v[i].z * inverse) & 255) << 16 | (u32)__float2int_rn(v[i].w * inverse) << 24;
#if ONE
      // |q| in bytes; plane m of the merged query: low bits of the fields |q| bit m, high bits |q| bit m - 1
      const u32 minus = ((word >> 7) & 0x01010101u) * 255u, size = __vsub4(word ^ minus, minus);
      u32 sign = (minus & 0x03030303u) << 2 * t, mine0 = 0, mine1 = 0;
      sum = __dp4a((int)size, 0x01010101, sum);
#pragma unroll
      for (int m = 0; m < 8; m++) {
        u32 x = ((size >> m) & 0x01010101u) << 2 * t | (m ? ((size >> (m - 1)) & 0x01010101u) << (2 * t + 1) : 0u);
        x |= __shfl_xor_sync(~0u, x, 1);
        x |= __shfl_xor_sync(~0u, x, 2);
        if (m == 2 * t) mine0 = x;
        if (m == 2 * t + 1) mine1 = x;
      }
      sign |= __shfl_xor_sync(~0u, sign, 1);
      sign |= __shfl_xor_sync(~0u, sign, 2);
      ((u32*)q)[(c * 32 + (2 * t) * 4 + (g & 3)) * 2 + (g >> 2)] = mine0;
      ((u32*)q)[(c * 32 + (2 * t + 1) * 4 + (g & 3)) * 2 + (g >> 2)] = mine1;
      if (t == 0) ((u32*)q)[NCHP * 64 + (c * 4 + (g & 3)) * 2 + (g >> 2)] = sign;
#else
      sum = __dp4a((int)word, 0x01010101, sum);
      ((u32*)q)[(((c * 4 + t) * NT + n / 8) * 32 + (n % 8) * 4 + (g & 3)) * 2 + (g >> 2)] = word;
#endif
    }
    sum = __reduce_add_sync(~0u, sum);
    if (!lane) { sc[u * NQ + n] = step; off[u * NQ + n] = 1.5f * step * (float)sum; }
  }
  for (int n = warp; n < a.B; n += TW) {
    float s = 0;
#pragma unroll
    for (int i = 0; i < EPL; i++) if (i * 32 + lane < GROUPS) s += early.share[i] * __ldcg(a.group_energy + n * GROUPS + i * 32 + lane);
    s = warp_sum(s);
    if (!lane) {
      par[4 * n + 3] = s * a.z * a.z;
      par[4 * n + 1] = __ldcg(a.along_shift + n); par[4 * n + 2] = __ldcg(a.along_shift + NQ + n);
    }
  }
  __syncthreads();
  for (int n = warp; n < a.B; n += TW) {
    float o = lane < NGR ? off[lane * NQ + n] : 0, s = lane < NGR ? sc[lane * NQ + n] : 0;
    o = warp_sum(o);
    s = warp_sum(s * s * (float)min(8 * CG, WORDS - lane * 8 * CG) * (16.0f * 1.25f / 12.0f));
    if (!lane) { par[4 * n] = o; par[4 * NQ + n] = s * a.z * a.z; }
  }
  __syncthreads();
  if (a.qdump && blockIdx.x == 0)
    for (int i = tid; i < NCH * 4 * NT * 64; i += TW * 32) a.qdump[i] = ((u32*)q)[i];
  const int tiles = (a.nblk + 1) / 2, stride = gridDim.x * NW;
  const u32 barriers = shared_address(smem + S_BAR) + warp * DEPTH * 8;
  char* const ring = smem + S_RING + warp * DEPTH * STAGE;
  int stage = 0, parity = 0;
  int fill_tile = blockIdx.x * NW + warp + DEPTH / NGR * stride, fill_group = DEPTH % NGR;
#if ONE
#if PILOT
  if (warp == NW) {
    asm volatile("bar.sync 1, %0;" :: "n"(TW * 32) : "memory");
    u64 v = lane < NW ? win[lane * NQ] : 0;
    for (int x = 16; x; x >>= 1) { u64 o = __shfl_xor_sync(~0u, v, x); if (o > v) v = o; }
    if ((u32)(v >> 32) > ordered(NEG)) {
      const int row = ROW_BITS((u32)v);
      float s = noisy(a, exact_dot(a, row, (const uint4*)a.hidden), 0, row);
      if (!lane) atomicMax(a.best, packed(s, row));
    }
    return;
  }
  const int own = blockIdx.x * NW + warp < tiles ? (tiles - blockIdx.x * NW - warp + stride - 1) / stride : 0;
  int until = max(1, own * 3 / 4);
  if (own == 0) {
    if (lane == 0) win[warp * NQ] = 0;
    asm volatile("bar.arrive 1, %0;" :: "n"(TW * 32) : "memory");
  }
#endif
  // one query, bit planes: lane L ends up with row L of the tile
  const uint2* sign_of = q + NCHP * 32;
  const float weight = (float)(1 << 2 * t);
  float best = NEG;
  int best_row = 0;
  const float4 p = *(const float4*)par;
  const float vb = par[4 * NQ];
  for (int tile = blockIdx.x * NW + warp; tile < tiles; tile += stride) {
    float total[4] = {0, 0, 0, 0}, rs, re, rd;
#pragma unroll 1
    for (int grp = 0; grp < NGR; grp++) {
      char* const here = ring + stage * STAGE;
      wait_stage(barriers + stage * 8, parity);
      const char* codes = here + (lane >> 4) * STB + t * 64 + sub * 16;
      const uint2* qg = q + grp * (CG * 32) + lane;
      const uint2* xg = sign_of + grp * (CG * 4) + t;
      int c[4], e[4];
#pragma unroll
      for (int i = 0; i < CG; i++) {
        if (NCH % CG == 0 || grp * CG + i < NCH) {
          const uint4 xa = *(const uint4*)(codes + i * 512), xb = *(const uint4*)(codes + i * 512 + 256);
          const uint2 b = qg[i * 32], x = xg[i * 4];
          if (i == 0) {
            mma_b1(c, xa.x ^ x.x, xa.y ^ x.x, xb.x ^ x.y, xb.y ^ x.y, b.x, b.y, MAGIC);
            mma_b1(e, xa.z ^ x.x, xa.w ^ x.x, xb.z ^ x.y, xb.w ^ x.y, b.x, b.y, MAGIC);
          } else {
            mma_b1_more(c, xa.x ^ x.x, xa.y ^ x.x, xb.x ^ x.y, xb.y ^ x.y, b.x, b.y);
            mma_b1_more(e, xa.z ^ x.x, xa.w ^ x.x, xb.z ^ x.y, xb.w ^ x.y, b.x, b.y);
          }
        }
      }
      const float step = sc[grp * NQ];
      total[0] += step * (__int_as_float(c[0] + 2 * c[1]) - MAGICF);
      total[1] += step * (__int_as_float(c[2] + 2 * c[3]) - MAGICF);
      total[2] += step * (__int_as_float(e[0] + 2 * e[1]) - MAGICF);
      total[3] += step * (__int_as_float(e[2] + 2 * e[3]) - MAGICF);
      if (grp == NGR - 1) {
#if META
        const char* m = here + (lane >> 4) * STB + LASTW * 64 + (lane & 15) * 2;
        rs = bf(*(const u16*)m); re = bf(*(const u16*)(m + 32)); rd = *(const float*)(m + 64 + (lane & 15) * 2);
#else
        const char* m = here + CG * 512 + lane * 2;
        rs = bf(*(const u16*)m); re = bf(*(const u16*)(m + 64)); rd = *(const float*)(here + STB + CG * 512 + lane * 4);
#endif
      }
      __syncwarp();
      if (lane == 0 && fill_tile < tiles) fill_stage(a, shared_address(here), barriers + stage * 8, fill_tile, fill_group);
      if (++fill_group == NGR) { fill_group = 0; fill_tile += stride; }
      if (++stage == DEPTH) { stage = 0; parity ^= 1; }
    }
    const bool hi2 = t & 2, hi1 = t & 1;
    float k0 = hi2 ? total[2] : total[0], k1 = hi2 ? total[3] : total[1];
    const float o0 = hi2 ? total[0] : total[2], o1 = hi2 ? total[1] : total[3];
    k0 = k0 * weight + __shfl_xor_sync(~0u, o0 * weight, 2);
    k1 = k1 * weight + __shfl_xor_sync(~0u, o1 * weight, 2);
    const float sum = (hi1 ? k1 : k0) + __shfl_xor_sync(~0u, hi1 ? k0 : k1, 1);
    const int row = tile * 32 + lane, blk = row >> 4;
    const bool inside = row < a.V;
    float s = rs * (sum - p.x) + (p.y * rd + p.z), sd;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(sd) : "f"(p.w * re * re + vb * rs * rs));
#if SAMPLE
    uint4 rnd = philox(row >> 2, a.step * NQ, a.seed, 0);
    u32 word = t == 0 ? rnd.x : t == 1 ? rnd.y : t == 2 ? rnd.z : rnd.w;
    s = s * a.inv_temp + gumbel(word);
    sd *= a.inv_temp;
#endif
    if (!inside) s = NEG;
    const float bound = unordered(low[0]);
    float up = s + sd;
    const float mine = up;
    if (s > best) { best = s; best_row = row; }
    if (s - sd > bound) atomicMax(low, ordered(s - sd));
    for (int x = 1; x < 16; x <<= 1) up = fmaxf(up, __shfl_xor_sync(~0u, up, x));
    if (blk < a.nblk) {
      if ((lane & 15) == 0) a.bmax[blk] = up;
      if (LOGITS) a.upper[row] = s;
      else if (up >= bound) a.upper[row] = mine;
    }
#if PILOT
    if (--until == 0) {
      u64 v = packed(best, best_row);
      for (int x = 1; x < 32; x <<= 1) {
        u64 o = __shfl_xor_sync(~0u, v, x);
        if (o > v) v = o;
      }
      if (lane == 0) win[warp * NQ] = v;
      __syncwarp();
      asm volatile("bar.arrive 1, %0;" :: "n"(TW * 32) : "memory");
    }
#endif
  }
#if !PILOT
  {
    u64 v = packed(best, best_row);
    for (int x = 1; x < 32; x <<= 1) {
      u64 o = __shfl_xor_sync(~0u, v, x);
      if (o > v) v = o;
    }
    if (lane == 0) win[warp * NQ] = v;
  }
  __syncthreads();
#endif
#else
  float total[2][NT][4];
  float best[NT][2];
  int best_row[NT][2];
#pragma unroll
  for (int nt = 0; nt < NT; nt++) { best[nt][0] = best[nt][1] = NEG; best_row[nt][0] = best_row[nt][1] = 0; }
  for (int tile = blockIdx.x * NW + warp; tile < tiles; tile += stride) {
    Meta meta;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int nt = 0; nt < NT; nt++) total[m][nt][0] = total[m][nt][1] = total[m][nt][2] = total[m][nt][3] = 0;
#pragma unroll 1
    for (int grp = 0; grp < NGR; grp++) {
      char* const here = ring + stage * STAGE;
      wait_stage(barriers + stage * 8, parity);
      const char* codes = here + (lane >> 4) * STB + t * 64 + sub * 16;
      const uint2* qg = q + grp * (CG * 4 * NT * 32) + lane;
      int acc[2][NT][4];
#pragma unroll
      for (int i = 0; i < CG; i++) {
        if (NCH % CG == 0 || grp * CG + i < NCH) {
          const uint4 xa = *(const uint4*)(codes + i * 512), xb = *(const uint4*)(codes + i * 512 + 256);
#pragma unroll
          for (int f = 0; f < 4; f++) {
            const u32 k = 0x03030303u;
            u32 a0 = (xa.x >> 2 * f) & k, a1 = (xa.y >> 2 * f) & k, a2 = (xb.x >> 2 * f) & k, a3 = (xb.y >> 2 * f) & k;
            u32 e0 = (xa.z >> 2 * f) & k, e1 = (xa.w >> 2 * f) & k, e2 = (xb.z >> 2 * f) & k, e3 = (xb.w >> 2 * f) & k;
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
              uint2 b = qg[((i * 4 + f) * NT + nt) * 32];
              if (f == 0 && i == 0) {
                mma_s8_first(acc[0][nt], a0, a1, a2, a3, b.x, b.y, MAGIC);
                mma_s8_first(acc[1][nt], e0, e1, e2, e3, b.x, b.y, MAGIC);
              } else {
                mma_s8(acc[0][nt], a0, a1, a2, a3, b.x, b.y);
                mma_s8(acc[1][nt], e0, e1, e2, e3, b.x, b.y);
              }
            }
          }
        }
      }
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        float2 s = *(const float2*)(sc + grp * NQ + nt * 8 + 2 * t);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          total[m][nt][0] += s.x * (__int_as_float(acc[m][nt][0]) - MAGICF);
          total[m][nt][1] += s.y * (__int_as_float(acc[m][nt][1]) - MAGICF);
          total[m][nt][2] += s.x * (__int_as_float(acc[m][nt][2]) - MAGICF);
          total[m][nt][3] += s.y * (__int_as_float(acc[m][nt][3]) - MAGICF);
        }
      }
      if (grp == NGR - 1) meta = read_meta(here);
      __syncwarp();
      if (lane == 0 && fill_tile < tiles) fill_stage(a, shared_address(here), barriers + stage * 8, fill_tile, fill_group);
      if (++fill_group == NGR) { fill_group = 0; fill_tile += stride; }
      if (++stage == DEPTH) { stage = 0; parity ^= 1; }
    }
    // rows row0..row0+3 of this lane: total[i >> 1][.][(i & 1) * 2 + col]
    const int blk = 2 * tile + (g >> 2), row0 = blk * 16 + sub * 4;
    const bool inside = blk < a.nblk, full = tile * 32 + 32 <= a.V;
    const float rs[4] = {bf(meta.scale.x), bfh(meta.scale.x), bf(meta.scale.y), bfh(meta.scale.y)};
    const float re[4] = {bf(meta.error.x), bfh(meta.error.x), bf(meta.error.y), bfh(meta.error.y)};
    const float rd[4] = {meta.direction.x, meta.direction.y, meta.direction.z, meta.direction.w};
    float re2[4], rs2[4];
#pragma unroll
    for (int i = 0; i < 4; i++) { re2[i] = re[i] * re[i]; rs2[i] = rs[i] * rs[i]; }
    float* const up_at = a.upper + row0;
    float* const max_at = a.bmax + blk;
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
#pragma unroll
      for (int col = 0; col < 2; col++) {
        const int n = nt * 8 + 2 * t + col;
        if (col == 1 && a.B == 1) continue;
        const float4 p = *(const float4*)(par + 4 * n);
        const float vb = par[4 * NQ + n], bound = unordered(low[n]);
        float s[4], u[4], sd[4];
#if SAMPLE
        uint4 rnd = philox(row0 >> 2, a.step * NQ + n, a.seed, 0);
        u32 rn[4] = {rnd.x, rnd.y, rnd.z, rnd.w};
#endif
#pragma unroll
        for (int i = 0; i < 4; i++) {
          s[i] = rs[i] * (total[i >> 1][nt][(i & 1) * 2 + col] - p.x) + (p.y * rd[i] + p.z);
          asm("sqrt.approx.f32 %0, %1;" : "=f"(sd[i]) : "f"(p.w * re2[i] + vb * rs2[i]));
#if SAMPLE
          s[i] = s[i] * a.inv_temp + gumbel(rn[i]);
          sd[i] *= a.inv_temp;
#endif
        }
        if (!full) {
#pragma unroll
          for (int i = 0; i < 4; i++) if (row0 + i >= a.V) s[i] = NEG;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) u[i] = s[i] + sd[i];
        float up = fmaxf(fmaxf(u[0], u[1]), fmaxf(u[2], u[3]));
        const float m4 = fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3]));
        if (m4 > best[nt][col]) {
          best[nt][col] = m4;
          best_row[nt][col] = row0 + (m4 == s[0] ? 0 : m4 == s[1] ? 1 : m4 == s[2] ? 2 : 3);
        }
        const float lo = m4 - fmaxf(fmaxf(sd[0], sd[1]), fmaxf(sd[2], sd[3]));
        if (lo > bound) atomicMax(low + n, ordered(lo));
        up = fmaxf(up, __shfl_xor_sync(~0u, up, 4));
        up = fmaxf(up, __shfl_xor_sync(~0u, up, 8));
        if (inside && n < a.B) {
          if (sub == 0) max_at[(size_t)n * a.nblk] = up;
          if (LOGITS)
            *(float4*)(up_at + (size_t)n * a.nblk * 16) = make_float4(s[0], s[1], s[2], s[3]);
          else if (up >= bound)
            *(float4*)(up_at + (size_t)n * a.nblk * 16) = make_float4(u[0], u[1], u[2], u[3]);
        }
      }
  }
  // the winner of this block, exactly, if it may be the winner of all
#pragma unroll
  for (int nt = 0; nt < NT; nt++)
#pragma unroll
    for (int col = 0; col < 2; col++) {
      u64 v = packed(best[nt][col], best_row[nt][col]);
      for (int x = 4; x < 32; x <<= 1) {
        u64 o = __shfl_xor_sync(~0u, v, x);
        if (o > v) v = o;
      }
      if (g == 0) win[warp * NQ + nt * 8 + 2 * t + col] = v;
    }
  __syncthreads();
#endif
#if !PILOT
  int* count = (int*)low;  // [0]: number of queries in the list that follows
  u64 mine = 0;
  bool go = false;
  if (tid < a.B) {
#pragma unroll
    for (int w = 0; w < NW; w++) mine = max(mine, win[w * NQ + tid]);
    go = mine != 0;
    if (a.B > 1 && go) {
      u64 old = atomicMax(a.top + tid, mine);
      float margin = 0.5f * a.mean_error * sqrtf(par[4 * tid + 3]);
#if SAMPLE
      margin *= a.inv_temp;
#endif
      if (old > mine && unordered((u32)(mine >> 32)) < unordered((u32)(old >> 32)) - margin) go = false;
    }
  }
  if (warp == 0) {
    const u32 mask = __ballot_sync(~0u, go);
    if (!lane) count[0] = __popc(mask);
    if (go) win[__popc(mask & ((1u << lane) - 1))] = (u64)tid << 32 | (ROW_BITS((u32)mine));
  }
  __syncthreads();
  for (int i = warp; i < count[0]; i += NW) {
    const int n = (int)(win[i] >> 32), row = (int)(u32)win[i];
    float s = noisy(a, exact_dot(a, row, (const uint4*)a.hidden + (size_t)n * D8), n, row);
    if (!lane) atomicMax(a.best + n, packed(s, row));
  }
#endif
}

// 3. selection: every row whose upper bound reaches the best exact logit so far.
#define LIST 4096
#define SMALL 2048
struct __align__(16) SelectShared {
  u32 qref[4][RCH * 8];
  u64 best; int blocks, rows, refined, pad;
  float refine_scale[RCH], refine_offset[RCH];
  float base_a, base_b, refined_a, refined_b, offset_refine;
  int row_list[2][SMALL];
  int block_list[LIST];
};
#define S_SELECT_H ((sizeof(SelectShared) + 15) / 16 * 16)
__device__ __forceinline__ void row_numbers(const Args& a, int row, float& scale, float& error) {
#if META
  const char* p = (const char*)(a.base + (size_t)(row >> 4) * BSTRIDE + WORDS * 4);
  scale = bf(((const u16*)p)[row & 15]); error = bf(((const u16*)(p + 32))[row & 15]);
#else
  scale = bf(a.scale[row]); error = bf(a.error[row]);
#endif
}
// The refined query and the variances, by the whole block; only when many rows survive (or with LOGITS).
template <int W> __device__ void refine_query(const Args& a, int n, SelectShared& sh) {
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  for (int c = NCH + warp; c < NCH + RCH; c += W) {
    int group = a.word_group[c * 8 + (lane >> 2)];
    float gain = a.word_gain[c * 8 + (lane >> 2)], step;
    int sum;
    float4 v = group >= 0 ? __ldcg((const float4*)(a.coded + n * (GROUPS * 16) + group * 16 + (lane & 3) * 4)) : make_float4(0, 0, 0, 0);
    u32 word = quantise(v, gain, step, sum);
    if (c >= NCH) {
      sh.qref[lane & 3][(c - NCH) * 8 + (lane >> 2)] = word;
      if (!lane) { sh.refine_scale[c - NCH] = step; sh.refine_offset[c - NCH] = 1.5f * step * (float)sum; }
    }
    if (c >= NCH && !lane) atomicAdd(&sh.refined_b, step * step * (float)min(8, GROUPS - (c - NCH) * 8) * (16.0f * 1.25f / 12.0f));
  }
  for (int u = warp; u < NGR; u += W) {
    float peak = 0;
    for (int c = u * CG; c < min(NCH, (u + 1) * CG); c++) {
      const int group = a.word_group[c * 8 + (lane >> 2)];
      const float gain = a.word_gain[c * 8 + (lane >> 2)];
      float4 v = group >= 0 ? __ldcg((const float4*)(a.coded + n * (GROUPS * 16) + group * 16 + (lane & 3) * 4)) : make_float4(0, 0, 0, 0);
      peak = fmaxf(peak, fabsf(gain) * fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
    }
    peak = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(peak))) / 127.0f;
    const float rounding = peak * peak * (float)min(8 * CG, WORDS - u * 8 * CG) * (16.0f * 1.25f / 12.0f);
    if (!lane) { atomicAdd(&sh.base_b, rounding); atomicAdd(&sh.refined_b, rounding); }
  }
  if (warp == 0) {
    float s = 0, r = 0;
    for (int g = lane; g < GROUPS; g += 32) {
      float e = __ldcg(a.group_energy + n * GROUPS + g);
      s += e * a.share_base[g]; r += e * a.share_refined[g];
    }
    s = warp_sum(s); r = warp_sum(r);
    if (!lane) { sh.base_a = s; sh.refined_a = r; }
  }
  __syncthreads();
  if (warp == 0) {
    float o = warp_sum(lane < RCH ? sh.refine_offset[lane] : 0);
    if (!lane) sh.offset_refine = o;
  }
  __syncthreads();
}
template <int W> __device__ void select_early(const Args& a, int n, char* smem) {
  SelectShared& sh = *(SelectShared*)smem;
  uint4* h = (uint4*)(smem + S_SELECT_H);
  if (threadIdx.x == 0) { sh.best = 0; sh.blocks = sh.rows = sh.refined = 0; sh.base_b = sh.refined_b = 0; }
  for (int i = threadIdx.x; i < D8; i += W * 32) h[i] = __ldg((const uint4*)a.hidden + (size_t)n * D8 + i);
  __syncthreads();
}
template <int W> __device__ void select_phase(const Args& a, int n, int part, char* smem) {
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  SelectShared& sh = *(SelectShared*)smem;
  const uint4* h = (const uint4*)(smem + S_SELECT_H);
  const int share = (a.nblk - part + a.P - 1) / a.P;
  const float* upper = a.upper + (size_t)n * a.nblk * 16;
  const float* bmax = a.bmax + (size_t)n * a.nblk;
  bool prepared = false;
  float E;
  const bool small = share * 16 <= SMALL && !LOGITS;
  if (small) {  // bounds of all rows of this part at once
    const u64 best = __ldcg(a.best + n);
    constexpr int IT = (SMALL + W * 32 - 1) / (W * 32);
    float u[IT], m[IT];
#pragma unroll
    for (int k = 0; k < IT; k++) {
      int i = tid + k * W * 32, blk = part + (i >> 4) * a.P;
      bool in = (i >> 4) < share;
      u[k] = in ? __ldcg(upper + blk * 16 + (i & 15)) : NEG;
      m[k] = in ? __ldcg(bmax + blk) : NEG;
    }
    E = unordered((u32)(best >> 32));
#pragma unroll
    for (int k = 0; k < IT; k++) {
      int i = tid + k * W * 32, row = (part + (i >> 4) * a.P) * 16 + (i & 15);
      if (m[k] >= E && u[k] >= E && row != ROW_BITS((u32)best) && row < a.V) sh.row_list[0][atomicAdd(&sh.rows, 1)] = row;
    }
    __syncthreads();
  } else {
    E = unordered((u32)(__ldcg(a.best + n) >> 32));
  }
  for (int i0 = 0; i0 < share; i0 += LIST) {
    if (!small) {
#pragma unroll 4
      for (int i = i0 + tid; i < min(share, i0 + LIST); i += W * 32)
        if (__ldcg(bmax + part + i * a.P) >= E) sh.block_list[atomicAdd(&sh.blocks, 1)] = part + i * a.P;
      __syncthreads();
    }
    const int blocks = small ? 1 : sh.blocks;
    for (int b0 = 0; b0 < blocks; b0 += 64) {
      if (!small) {
        if (tid == 0) sh.rows = sh.refined = 0;
        if (LOGITS && !prepared) { refine_query<W>(a, n, sh); prepared = true; }
        __syncthreads();
        for (int i = tid; i < 16 * min(64, blocks - b0); i += W * 32) {
          int row = sh.block_list[b0 + (i >> 4)] * 16 + (i & 15);
          if (row < a.V) {
            float u = __ldcg(upper + row);
            if (LOGITS) {
              float scale, error;
              row_numbers(a, row, scale, error);
              u += a.z * sqrtf(sh.base_a * error * error + sh.base_b * scale * scale) * 1.0001f;
            }
            if (u >= E) sh.row_list[0][atomicAdd(&sh.rows, 1)] = row;
          }
        }
        __syncthreads();
      }
      int rows = sh.rows, list = 0;
      if (a.stats && tid == 0) atomicAdd(a.stats + n * 2, rows);
      if (rows > a.refine_min) {
        if (!prepared) { refine_query<W>(a, n, sh); prepared = true; }
        for (int j = warp; j < rows; j += W) {
          int row = sh.row_list[0][j];
          float part_sum = 0;
          for (int w4 = lane; w4 < REFW / 4; w4 += 32) {
            uint4 x = __ldg(a.refine + (size_t)row * (REFW / 4) + w4);
            int dp = 0;
#pragma unroll
            for (int f = 0; f < 4; f++) {
              uint4 y = *((const uint4*)sh.qref[f] + w4);
              dp = __dp4a((int)((x.x >> 2 * f) & 0x03030303u), (int)y.x, dp);
              dp = __dp4a((int)((x.y >> 2 * f) & 0x03030303u), (int)y.y, dp);
              dp = __dp4a((int)((x.z >> 2 * f) & 0x03030303u), (int)y.z, dp);
              dp = __dp4a((int)((x.w >> 2 * f) & 0x03030303u), (int)y.w, dp);
            }
            part_sum += (float)dp * sh.refine_scale[w4 >> 1];
          }
          part_sum = warp_sum(part_sum);
          if (!lane) {
            float scale, error;
            row_numbers(a, row, scale, error);
            float wide = a.z * sqrtf(sh.base_a * error * error + sh.base_b * scale * scale);
            error = bf(a.error_refined[row]);
            float sd = a.z * sqrtf(sh.refined_a * error * error + sh.refined_b * scale * scale);
            float gain = scale * (part_sum - sh.offset_refine);
#if SAMPLE
            sd *= a.inv_temp; gain *= a.inv_temp; wide *= a.inv_temp;
#endif
            float* at = a.upper + (size_t)n * a.nblk * 16 + row;
            float s = __ldcg(at) + gain - (LOGITS ? 0 : wide);
            if (LOGITS) *at = s;
            if (s + sd >= E) sh.row_list[1][atomicAdd(&sh.refined, 1)] = row;
          }
        }
        __syncthreads();
        rows = sh.refined; list = 1;
      }
      if (a.stats && tid == 0) atomicAdd(a.stats + n * 2 + 1, rows);
      for (int j = warp; j < rows; j += W) {
        int row = sh.row_list[list][j];
        float s = noisy(a, exact_dot(a, row, h), n, row);
        if (!lane) {
          atomicMax(&sh.best, packed(s, row));
          if (LOGITS) a.upper[(size_t)n * a.nblk * 16 + row] = s;
        }
      }
      __syncthreads();
    }
    if (small) break;
    if (tid == 0) sh.blocks = 0;
    __syncthreads();
  }
  if (tid == 0) {
    if (sh.best > 0) {
      atomicMax(a.best + n, sh.best);
      if (!DIRECT) __threadfence();
    }
    if (!DIRECT && atomicAdd(a.done + n, 1) == a.P - 1) {
      __threadfence();
      u64 v = __ldcg(a.best + n);
      a.token[n] = ROW_BITS((u32)v);
      a.logit[n] = unordered((u32)(v >> 32));
      a.best[n] = 0; a.top[n] = 0; a.done[n] = 0;
    }
  }
}

extern "C" __global__ void __launch_bounds__(SW * 32) query_kernel(const __grid_constant__ Args a) {
  pdl_launch();
  pdl_wait();
  query_phase<SW>(a, blockIdx.x, (char*)smem4);
}
extern "C" __global__ void __maxnreg__(REGS) scan_kernel(const __grid_constant__ Args a) {
  Early early;
  scan_early(a, (char*)smem4, early);
  pdl_wait();
  pdl_launch();
  scan_phase(a, (char*)smem4, early);
}
// grid: B * P
extern "C" __global__ void __maxnreg__(80) select_kernel(const __grid_constant__ Args a) {
  select_early<SW>(a, blockIdx.x / a.P, (char*)smem4);
  pdl_wait();
  select_phase<SW>(a, blockIdx.x / a.P, blockIdx.x % a.P, (char*)smem4);
}
extern "C" __global__ void empty_kernel(const __grid_constant__ Args a) {
  pdl_launch();
  pdl_wait();
}

__device__ void grid_barrier(u32* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    u32 old, now, target;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(old) : "l"(counter) : "memory");
    target = (old / gridDim.x + 1) * gridDim.x;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while ((int)(now - target) < 0);
  }
  __syncthreads();
}
// All three in one launch; grid = multiprocessors, every block resident.
extern "C" __global__ void __launch_bounds__(TW * 32, 1) fused_kernel(const __grid_constant__ Args a) {
  Early early;
  scan_early(a, (char*)smem4, early);
  for (int g = blockIdx.x; g < GROUPS + a.B; g += gridDim.x) { query_phase<TW>(a, g, (char*)smem4 + S_SCAN_END); __syncthreads(); }
  grid_barrier(a.barrier);
  scan_phase(a, (char*)smem4, early);
  __syncthreads();
  if (blockIdx.x < a.B * a.P) select_early<TW>(a, blockIdx.x / a.P, (char*)smem4);
  grid_barrier(a.barrier);
  if (blockIdx.x < a.B * a.P) select_phase<TW>(a, blockIdx.x / a.P, blockIdx.x % a.P, (char*)smem4);
}
