// What every kernel shares; put in front of each source. The compiler's options name three types:
//   STORAGE     of activations and parameters: float, double, float16 or bfloat16;
//   GRADIENT    of the gradients of parameters: STORAGE, or float where that has 16 bits;
//   ARITHMETIC  of everything in registers and of statistics: double for double, else float.
// The 16-bit types are defined here, not taken from the toolkit's headers, which need not be installed.
//
// Conventions: sizes are long long, addresses of absent arrays null. Kernels over a matrix [rows, width] either give
// each row a block (rows that are reduced), or let each thread walk down the rows of its own columns (everything else),
// so that bias and gain are read once and sums over rows need no atomics: results are the same bits run to run.

struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

typedef STORAGE T;
typedef GRADIENT G;
typedef ARITHMETIC A;

enum {
    VECTOR = 16 / sizeof(T),  // elements of one 16-byte access
    MOST_THREADS = 256,       // of a block
};
#define INFINITE ((A)__int_as_float(0x7f800000))

#ifdef __CUDACC__
#define DYNAMIC_SHARED(type, name)                         \
    extern __shared__ __align__(16) unsigned char room_[]; \
    type* name = reinterpret_cast<type*>(room_)
__device__ inline float widen(float16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
__device__ inline void narrow(float x, float16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ inline void narrow(float x, bfloat16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
#else
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulation::dynamic_shared())
__device__ inline float widen(float16 x) { return emulation::half_value(x.bits); }
__device__ inline void narrow(float x, float16& y) { y.bits = emulation::half_bits(x); }
__device__ inline void narrow(float x, bfloat16& y) { y.bits = emulation::bfloat16_bits(x); }
#endif
__device__ inline float widen(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(double x, double& y) { y = x; }

// The value that a T holds after storing x.
__device__ inline A stored(A x) { T y; narrow(x, y); return widen(y); }

template <class S, int N> struct alignas(N * sizeof(S)) Pack { S v[N]; };

template <int N, class S> __device__ inline void load(const S* from, A (&to)[N]) {
    constexpr int STEP = N * sizeof(S) > 16 ? 16 / sizeof(S) : N;
    #pragma unroll
    for (int first = 0; first < N; first += STEP) {
        Pack<S, STEP> pack = *reinterpret_cast<const Pack<S, STEP>*>(from + first);
        #pragma unroll
        for (int i = 0; i < STEP; i++) to[first + i] = widen(pack.v[i]);
    }
}

template <int N, class S> __device__ inline void store(S* to, const A (&from)[N]) {
    constexpr int STEP = N * sizeof(S) > 16 ? 16 / sizeof(S) : N;
    #pragma unroll
    for (int first = 0; first < N; first += STEP) {
        Pack<S, STEP> pack;
        #pragma unroll
        for (int i = 0; i < STEP; i++) narrow(from[first + i], pack.v[i]);
        *reinterpret_cast<Pack<S, STEP>*>(to + first) = pack;
    }
}

// Zeros where the array is absent.
template <int N, class S> __device__ inline void load_if(const S* from, long long at, A (&to)[N]) {
    if (from) {
        load(from + at, to);
    } else {
        #pragma unroll
        for (int i = 0; i < N; i++) to[i] = 0;
    }
}

// Whether every row of these arrays allows 16-byte accesses.
template <class... P> __device__ inline bool aligned(long long width, const P*... arrays) {
    return width % VECTOR == 0 && ((0 | ... | reinterpret_cast<unsigned long long>(arrays)) & 15) == 0;
}

// ---- threads that own columns ----------------------------------------------------------------------------------------

// Blocks stand side by side along the columns; N elements per thread.
#define COLUMNS_OF_BLOCK(base, width, N)                                         \
    for (long long base = (long long)blockIdx.x * blockDim.x * N; base < width; \
         base += (long long)gridDim.x * blockDim.x * N)
// The same where blocks stand along y.
#define COLUMNS_OF_BLOCK_Y(base, width, N)                                       \
    for (long long base = (long long)blockIdx.y * blockDim.x * N; base < width; \
         base += (long long)gridDim.y * blockDim.x * N)
#define ROWS_OF_THREAD(row, rows)                                                             \
    for (long long row = (long long)blockIdx.y * blockDim.y + threadIdx.y; row < rows; \
         row += (long long)gridDim.y * blockDim.y)

// Adds the sums of the block's threads of one column in a fixed order and stores them in partials [gridDim.y, width].
// Every thread of the block comes here, those beyond the width too.
template <int N> __device__ inline void store_partial(A (&sum)[N], A* partials, long long column, long long width) {
    __shared__ A parts[MOST_THREADS * VECTOR];
    bool inside = column < width;
    if (blockDim.y > 1) {
        #pragma unroll
        for (int i = 0; i < N; i++) parts[(threadIdx.y * blockDim.x + threadIdx.x) * N + i] = sum[i];
        __syncthreads();
        if (threadIdx.y == 0 && inside)
            for (unsigned y = 1; y < blockDim.y; y++)
                #pragma unroll
                for (int i = 0; i < N; i++) sum[i] += parts[(y * blockDim.x + threadIdx.x) * N + i];
        __syncthreads();
    }
    if (threadIdx.y == 0 && inside)
        #pragma unroll
        for (int i = 0; i < N; i++) partials[blockIdx.y * width + column + i] = sum[i];
}

// ---- sums and maxima over a block in a fixed order; every thread gets the result -------------------------------------

struct Sum { template <class V> __device__ V operator()(V a, V b) const { return a + b; } };
struct Largest { template <class V> __device__ V operator()(V a, V b) const { return fmax(a, b); } };

template <class Op, class V> __device__ inline V over_warp(Op op, V value) {
    #pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value = op(value, __shfl_xor_sync(0xffffffffu, value, mask));
    return value;
}

template <class Op, class V> __device__ inline V over_block(Op op, V value) {
    __shared__ V parts[32];
    value = over_warp(op, value);
    if (blockDim.x <= 32) return value;
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    value = parts[0];
    for (unsigned i = 1; i < blockDim.x / 32; i++) value = op(value, parts[i]);
    __syncthreads();  // parts is used again by the next call
    return value;
}

// ---- dropout: the counter-based masks of executor/reference/dropout.py, bit for bit ---------------------------------

__device__ inline unsigned long long splitmix64(unsigned long long state) {
    unsigned long long z = state + 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

__device__ inline unsigned long long row_key(
    unsigned long long key, unsigned long long sample, unsigned long long position, unsigned long long head) {
    return splitmix64(splitmix64(splitmix64(key ^ sample) ^ position) ^ head);
}

__device__ inline bool kept(unsigned long long row, unsigned column, unsigned threshold) {
    unsigned h = column * 0x9E3779B1u + (unsigned)row;
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = ((h ^ (unsigned)(row >> 32)) ^ (h >> 13)) * 0xC2B2AE35u;
    return (h ^ (h >> 16)) >= threshold;
}

// Multiplies by 0 or keep = 1 / (1 - rate).
template <int N>
__device__ inline void drop(A (&values)[N], unsigned long long row, unsigned column, unsigned threshold, A keep) {
    #pragma unroll
    for (int i = 0; i < N; i++) values[i] *= kept(row, column + i, threshold) ? keep : (A)0;
}

// The dropout of a matrix of tokens, as kernels take it.
struct Dropout {
    unsigned threshold;  // 0: everything is kept
    A keep;
    unsigned long long key;
    const long long* samples;
    const long long* positions;
    unsigned batch, first_column;

    // Tokens are numbered position by position: row = s · batch + b.
    __device__ unsigned long long row(long long token) const {
        if (threshold == 0) return 0;
        unsigned s = (unsigned)token / batch;
        return row_key(key, samples[(unsigned)token - s * batch], positions[s], 0);
    }

    template <int N> __device__ void apply(A (&values)[N], unsigned long long row, long long column) const {
        if (threshold) drop(values, row, first_column + (unsigned)column, threshold, keep);
    }
};

#define DROPOUT_PARAMETERS                                                                                  \
    long long threshold, double keep, unsigned long long key, const long long *samples, const long long *positions, \
        long long batch, long long first_column
#define DROPOUT                                                                                            \
    Dropout { (unsigned)threshold, (A)keep, key, samples, positions, (unsigned)batch, (unsigned)first_column }
