// What CUDA C++ gives a kernel, for a host compiler: compile with -include device.h. Emulation for tests only.
#pragma once

struct dim3 {
    unsigned x, y, z;
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Job {
    virtual void run() const = 0;
};

const char* launch(const Job& what, const unsigned* grid, const unsigned* block, unsigned shared_bytes, int order);
void sync_block();
void sync_warp();
unsigned long long* exchange();  // the warp's 32 slots
int lane();

template <class V> V shuffle(V value, int source) {
    static_assert(sizeof(V) <= 8, "a shuffle moves at most 8 bytes");
    unsigned long long* slots = exchange();
    __builtin_memcpy(&slots[lane()], &value, sizeof(V));
    sync_warp();
    V result;
    __builtin_memcpy(&result, &slots[source & 31], sizeof(V));
    sync_warp();
    return result;
}

inline unsigned short half_bits(float x) {
    _Float16 h = (_Float16)x;
    unsigned short bits;
    __builtin_memcpy(&bits, &h, 2);
    return bits;
}

inline float half_value(unsigned short bits) {
    _Float16 h;
    __builtin_memcpy(&h, &bits, 2);
    return (float)h;
}

inline unsigned short bfloat16_bits(float x) {
    unsigned bits;
    __builtin_memcpy(&bits, &x, 4);
    if (x != x) return 0x7fff;  // what cvt.rn.bf16.f32 makes of every NaN
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ---- tensor cores and copies in the background ----------------------------------------------------------------------

// c [16, 8] += a [16, 16] · b [16, 8], the operands spread over the warp as mma.m16n8k16 says.
template <class Half> void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Half half) {
    struct Operands {
        float left[4][2], right[2][2];
    } mine;
    for (int e = 0; e < 2; e++) {
        for (int i = 0; i < 4; i++) mine.left[i][e] = half(a[i], e);
        mine.right[0][e] = half(b0, e);
        mine.right[1][e] = half(b1, e);
    }
    unsigned long long* slots = exchange();
    slots[lane()] = (unsigned long long)&mine;
    sync_warp();
    int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; i++) {
        int row = g + i / 2 * 8, column = 2 * t + i % 2;
        for (int k = 0; k < 16; k++) {
            const Operands* left = (const Operands*)slots[row % 8 * 4 + k % 8 / 2];
            const Operands* right = (const Operands*)slots[column * 4 + k % 8 / 2];
            c[i] += left->left[row / 8 + k / 8 * 2][k % 2] * right->right[k / 8][k % 2];
        }
    }
    sync_warp();
}

// Four 8 x 8 matrices of 16-bit elements; lane i has the address of row i % 8 of matrix i / 8.
template <bool TRANSPOSED> void load_matrices(unsigned (&r)[4], const void* row) {
    unsigned long long* slots = exchange();
    slots[lane()] = (unsigned long long)row;
    if ((unsigned long long)row % 16) __builtin_trap();
    sync_warp();
    int g = lane() / 4, t = lane() % 4;
    for (int j = 0; j < 4; j++) {
        const unsigned short* first = (const unsigned short*)slots[8 * j + (TRANSPOSED ? 2 * t : g)];
        const unsigned short* second = (const unsigned short*)slots[8 * j + (TRANSPOSED ? 2 * t + 1 : g)];
        r[j] = first[TRANSPOSED ? g : 2 * t] | (unsigned)second[TRANSPOSED ? g : 2 * t + 1] << 16;
    }
    sync_warp();
}

// A copy in the background arrives as late as it may: when the thread waits for its group.
void copy_async(void* to, const void* from, bool there);
void commit_copies();
void await_copies(int groups_left);
void* dynamic_shared();

// ---- launching a kernel from an array of pointers to its arguments --------------------------------------------------

template <int... I> struct Indices {};

template <class... P, int... I> void call(void (*kernel)(P...), void** arguments, Indices<I...>) {
    kernel(*static_cast<P*>(arguments[I])...);
}

template <class... P> const char* start(
    void (*kernel)(P...), const unsigned* grid, const unsigned* block, unsigned shared_bytes, void** arguments,
    int order) {
    struct Call : Job {
        void (*kernel)(P...);
        void** arguments;
        void run() const override { call(kernel, arguments, Indices<__integer_pack(int(sizeof...(P)))...>()); }
    } job;
    job.kernel = kernel;
    job.arguments = arguments;
    return launch(job, grid, block, shared_bytes, order);
}

template <class P> struct Kind;  // a kernel's parameters are of these kinds only
template <class P> struct Kind<P*> { static constexpr char value = 'p'; };
template <> struct Kind<long long> { static constexpr char value = 'q'; };
template <> struct Kind<unsigned long long> { static constexpr char value = 'Q'; };
template <> struct Kind<double> { static constexpr char value = 'd'; };

template <class... P> const char* signature(void (*)(P...)) {
    static const char kinds[] = {Kind<P>::value..., 0};
    return kinds;
}

}  // namespace emulation

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

inline void __syncthreads() { emulation::sync_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::sync_warp(); }
template <class V> V __shfl_xor_sync(unsigned, V value, int mask) { return emulation::shuffle(value, emulation::lane() ^ mask); }
template <class V> V __shfl_sync(unsigned, V value, int source) { return emulation::shuffle(value, source); }

inline unsigned __ballot_sync(unsigned, int vote) {
    unsigned long long* slots = emulation::exchange();
    slots[emulation::lane()] = vote != 0;
    emulation::sync_warp();
    unsigned votes = 0;
    for (int i = 0; i < 32; i++) votes |= (unsigned)slots[i] << i;
    emulation::sync_warp();
    return votes;
}

inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
inline float __int_as_float(int bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

#define EMULATED_FUNCTION(name)                                   \
    inline float name(float x) { return __builtin_##name##f(x); } \
    inline double name(double x) { return __builtin_##name(x); }
EMULATED_FUNCTION(exp)
EMULATED_FUNCTION(erf)
EMULATED_FUNCTION(log)
EMULATED_FUNCTION(sqrt)
#undef EMULATED_FUNCTION
inline float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
inline double fmax(double a, double b) { return __builtin_fmax(a, b); }
inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
inline float exp2f(float x) { return __builtin_exp2f(x); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
