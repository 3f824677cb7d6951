// Tensor cores, one warp at a time: products of 16 x 16 by 16 x 8 tiles of 16-bit elements, summed in float32.
//
// Who holds what (PTX ISA, mma.m16n8k16 and ldmatrix), with g = lane / 4 and t = lane % 4: of the result c[0], c[1] are
// row g, columns 2 t and 2 t + 1, and c[2], c[3] the same of row g + 8. The left operand's registers hold (g, 2 t),
// (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8), each with its right neighbour; the right operand's hold (2 t, g) and
// (2 t + 8, g), each with its lower neighbour. So two neighbouring results are a left operand of the next product.
//
// Tiles in shared memory have HEAD_DIM columns, a multiple of 16, and 8 more that keep rows in different banks.

constexpr int D = HEAD_DIM, PITCH = D + 8, STEPS = D / 16, CHUNKS = D / 8, WARPS = 4, THREADS = 32 * WARPS;
#define LOG2_E 1.44269504088896340736f
#define LN_2 0.69314718055994530942f

__device__ inline unsigned pack(float low, float high) {
    T a, b;
    narrow(low, a);
    narrow(high, b);
    return (unsigned)a.bits | (unsigned)b.bits << 16;
}

__device__ inline float widen_half(unsigned pair, int half) { T x; x.bits = pair >> 16 * half; return widen(x); }

#ifdef __CUDACC__
__device__ inline unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

#define MMA(TYPE)                                                                                                 \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
                 "{%8, %9}, {%0, %1, %2, %3};"                                                                    \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
__device__ inline void mma_of(bfloat16, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { MMA("bf16"); }
__device__ inline void mma_of(float16, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { MMA("f16"); }
#undef MMA
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { mma_of(T(), c, a, b0, b1); }

template <bool TRANSPOSED> __device__ inline void load_matrices(unsigned (&r)[4], const T* row) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// 16 bytes from global to shared memory in the background, or zeros.
__device__ inline void copy_async(T* to, const T* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the newest LEFT committed groups have arrived.
template <int LEFT> __device__ inline void await_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory"); }
#else
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulation::mma(c, a, b0, b1, [](unsigned pair, int half) { return widen_half(pair, half); });
}
template <bool TRANSPOSED> __device__ inline void load_matrices(unsigned (&r)[4], const T* row) {
    emulation::load_matrices<TRANSPOSED>(r, row);
}
__device__ inline void copy_async(T* to, const T* from, bool there) { emulation::copy_async(to, from, there); }
__device__ inline void commit_copies() { emulation::commit_copies(); }
template <int LEFT> __device__ inline void await_copies() { emulation::await_copies(LEFT); }
#endif

// Starts to copy rows first .. first + ROWS of x, with zeros beyond `rows` and beyond `width`, to a tile.
template <int ROWS> __device__ inline void fetch(
    T* tile, const T* x, long long stride, long long first, long long rows, long long width) {
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        int row = i / CHUNKS, column = i % CHUNKS * 8;
        bool there = first + row < rows && column < width;
        copy_async(tile + row * PITCH + column, there ? x + (first + row) * stride + column : x, there);
    }
}

// Left operand: 16 rows and 16 columns of a tile.
__device__ inline void load_left(unsigned (&a)[4], const T* tile, int row, int column) {
    int lane = threadIdx.x % 32;
    load_matrices<false>(a, tile + (row + lane % 16) * PITCH + column + lane / 16 * 8);
}

// Right operands of two products, whose columns are 16 rows of a tile: registers 0 and 1, then 2 and 3.
__device__ inline void load_right_rows(unsigned (&b)[4], const T* tile, int row, int column) {
    int lane = threadIdx.x % 32;
    load_matrices<false>(b, tile + (row + lane / 16 * 8 + lane % 8) * PITCH + column + lane / 8 % 2 * 8);
}

// The same, whose columns are 16 columns of a tile; the sum goes over 16 of its rows.
__device__ inline void load_right_columns(unsigned (&b)[4], const T* tile, int row, int column) {
    int lane = threadIdx.x % 32;
    load_matrices<true>(b, tile + (row + lane % 16) * PITCH + column + lane / 16 * 8);
}

// sums [16, 8 N] += left [16, D] · rowsᵀ, for N / 2 pairs of 8 rows of a tile; the left operand is in registers.
template <int N> __device__ inline void multiply_rows(float (&sums)[N][4], const unsigned (&left)[STEPS][4], const T* tile) {
    unsigned right[4];
    #pragma unroll
    for (int step = 0; step < STEPS; step++)
        #pragma unroll
        for (int n = 0; n < N; n += 2) {
            load_right_rows(right, tile, n * 8, step * 16);
            mma(sums[n], left[step], right[0], right[1]);
            mma(sums[n + 1], left[step], right[2], right[3]);
        }
}

// The same with a left operand in shared memory.
template <int N> __device__ inline void multiply_rows(float (&sums)[N][4], const T* left_tile, int row, const T* tile) {
    unsigned left[4], right[4];
    #pragma unroll
    for (int step = 0; step < STEPS; step++) {
        load_left(left, left_tile, row, step * 16);
        #pragma unroll
        for (int n = 0; n < N; n += 2) {
            load_right_rows(right, tile, n * 8, step * 16);
            mma(sums[n], left, right[0], right[1]);
            mma(sums[n + 1], left, right[2], right[3]);
        }
    }
}

// sums [16, D] += left [16, 8 N] · tile [8 N, D], where left are results of a product before.
template <int N> __device__ inline void multiply_columns(float (&sums)[CHUNKS][4], const float (&left)[N][4], const T* tile) {
    unsigned a[4], right[4];
    #pragma unroll
    for (int n = 0; n < N; n += 2) {
        a[0] = pack(left[n][0], left[n][1]);
        a[1] = pack(left[n][2], left[n][3]);
        a[2] = pack(left[n + 1][0], left[n + 1][1]);
        a[3] = pack(left[n + 1][2], left[n + 1][3]);
        #pragma unroll
        for (int c = 0; c < CHUNKS; c += 2) {
            load_right_columns(right, tile, n * 8, c * 8);
            mma(sums[c], a, right[0], right[1]);
            mma(sums[c + 1], a, right[2], right[3]);
        }
    }
}

// Writes factor · sums [16, D], or adds it, to rows of x through the calling warp's own 16 rows of a tile.
__device__ inline void write_rows(
    T* x, long long stride, long long first, long long rows, long long width, T* tile, const float (&sums)[CHUNKS][4],
    const float (&factor)[2], bool onto) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    __syncwarp();
    #pragma unroll
    for (int c = 0; c < CHUNKS; c++)
        #pragma unroll
        for (int half = 0; half < 2; half++)
            *reinterpret_cast<unsigned*>(tile + (g + 8 * half) * PITCH + c * 8 + 2 * t) =
                pack(sums[c][2 * half] * factor[half], sums[c][2 * half + 1] * factor[half]);
    __syncwarp();
    for (int i = lane; i < 16 * CHUNKS; i += 32) {
        int row = i / CHUNKS, column = i % CHUNKS * 8;
        if (first + row >= rows || column >= width) continue;
        T* to = x + (first + row) * stride + column;
        float value[8], before[8];
        load(tile + row * PITCH + column, value);
        if (onto) {
            load(to, before);
            #pragma unroll
            for (int e = 0; e < 8; e++) value[e] += before[e];
        }
        store(to, value);
    }
}

// ---- which tiles a block has to look at ------------------------------------------------------------------------------

struct Reach { long long lowest, highest; };  // of the positions of a block's rows

struct Lesser { __device__ long long operator()(long long a, long long b) const { return a < b ? a : b; } };
struct Greater { __device__ long long operator()(long long a, long long b) const { return a > b ? a : b; } };

// Positions first .. first + COUNT, as far as there are any; every warp finds the same.
template <int COUNT> __device__ inline Reach reach_of(const int* positions, long long first, long long count) {
    long long lowest = 1ll << 40, highest = -(1ll << 40);
    for (long long i = first + threadIdx.x % 32; i < first + COUNT && i < count; i += 32) {
        lowest = Lesser()(lowest, positions[i]);
        highest = Greater()(highest, positions[i]);
    }
    return {over_warp(Lesser(), lowest), over_warp(Greater(), highest)};
}

__device__ inline bool sees_some(const Mask& mask, Reach queries, Reach keys) {
    return !mask.limited || (keys.lowest - queries.highest <= mask.ahead && keys.highest - queries.lowest >= -mask.back);
}

__device__ inline bool sees_all(const Mask& mask, Reach queries, Reach keys) {
    return !mask.limited || (keys.highest - queries.lowest <= mask.ahead && keys.lowest - queries.highest >= -mask.back);
}

// ---- what the kernels of attention take ------------------------------------------------------------------------------

struct Place { long long s, b, h; };  // elements from one position, sequence and head to the next

#define ATTENTION_PARAMETERS                                                                                       \
    const long long *kv_index, double scale, long long queries, long long keys, long long width, long long back,   \
        long long ahead, const int *q_positions, const int *k_positions, long long limited, long long threshold,   \
        double keep, unsigned long long key, const long long *samples, const long long *head_ids
#define MASK Mask { back, ahead, q_positions, k_positions, limited }
