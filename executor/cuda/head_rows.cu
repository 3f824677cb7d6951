// Rows of d elements, one per position, sequence and head: the ends of blocked attention.
//
// Arrays [S, B, heads, d] lie with any stride of position, sequence and head; `lanes` threads, a power of two up to 32,
// share a row. Statistics are [B, heads, S].

struct Strides { long long s, b, h; };

struct Rows {
    long long seq, batch, heads, width;
    int lanes;

    __device__ long long item() const { return ((long long)blockIdx.x * blockDim.x + threadIdx.x) / lanes; }
    __device__ bool active() const { return item() < seq * batch * heads; }
    __device__ long long head() const { return item() % heads; }
    __device__ long long b() const { return item() / heads % batch; }
    __device__ long long s() const { return item() / heads / batch; }
    __device__ long long at(Strides strides) const { return s() * strides.s + b() * strides.b + head() * strides.h; }
    __device__ long long statistic(long long first, long long queries) const {
        return (b() * heads + head()) * queries + first + s();
    }
};

#define ROWS_PARAMETERS long long seq, long long batch, long long heads, long long width, long long lanes
#define ROWS Rows { seq, batch, heads, width, (int)lanes }
#define FOR_ELEMENTS(j, rows, N) \
    for (long long j = threadIdx.x % rows.lanes * N; j < rows.width; j += rows.lanes * N)

template <class... P> __device__ bool aligned_rows(Rows rows, Strides a, Strides b, const P*... arrays) {
    return aligned(rows.width, arrays...) && (a.s | a.b | a.h | b.s | b.b | b.h) % VECTOR == 0;
}

template <int N> __device__ void multiply(T* x, Rows rows, A factor) {
    A value[N];
    FOR_ELEMENTS(j, rows, N) {
        load(x + j, value);
        #pragma unroll
        for (int i = 0; i < N; i++) value[i] *= factor;
        store(x + j, value);
    }
}

// x *= factor; the rows are positions first .. first + seq of `queries`.
extern "C" __global__ void __launch_bounds__(256) multiply_heads(
    T* x, long long xs, long long xb, long long xh, const A* factors, long long first, long long queries,
    ROWS_PARAMETERS) {
    Rows rows = ROWS;
    if (!rows.active()) return;
    Strides strides = {xs, xb, xh};
    A factor = factors[rows.statistic(first, queries)];
    if (aligned_rows(rows, strides, strides, x))
        multiply<VECTOR>(x + rows.at(strides), rows, factor);
    else
        multiply<1>(x + rows.at(strides), rows, factor);
}

// x /= running_sum; logsumexp = running_max + log(running_sum), which may be either of the two itself.
extern "C" __global__ void __launch_bounds__(256) finish_heads(
    T* x, long long xs, long long xb, long long xh, const A* running_max, const A* running_sum, A* logsumexp,
    ROWS_PARAMETERS) {
    Rows rows = ROWS;
    Strides strides = {xs, xb, xh};
    long long at = rows.active() ? rows.statistic(0, seq) : 0;
    A total = running_sum[at], largest = running_max[at];
    __syncwarp();  // every thread of the row has read what one of them overwrites
    if (!rows.active()) return;
    A factor = total > 0 ? 1 / total : (A)1;
    if (aligned_rows(rows, strides, strides, x))
        multiply<VECTOR>(x + rows.at(strides), rows, factor);
    else
        multiply<1>(x + rows.at(strides), rows, factor);
    if (threadIdx.x % lanes == 0) logsumexp[at] = total > 0 ? largest + log(total) : -INFINITE;
}

template <int N> __device__ A product(const T* a, const T* b, Rows rows) {
    A x[N], y[N], sum = 0;
    FOR_ELEMENTS(j, rows, N) {
        load(a + j, x);
        load(b + j, y);
        #pragma unroll
        for (int i = 0; i < N; i++) sum += x[i] * y[i];
    }
    return sum;
}

// delta = sum over d of a · b.
extern "C" __global__ void __launch_bounds__(256) delta_heads(
    const T* a, long long as, long long ab, long long ah, const T* b, long long bs, long long bb, long long bh,
    A* delta, ROWS_PARAMETERS) {
    Rows rows = ROWS;
    Strides first = {as, ab, ah}, second = {bs, bb, bh};
    A sum = 0;
    if (rows.active()) {
        if (aligned_rows(rows, first, second, a, b))
            sum = product<VECTOR>(a + rows.at(first), b + rows.at(second), rows);
        else
            sum = product<1>(a + rows.at(first), b + rows.at(second), rows);
    }
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (rows.active() && threadIdx.x % lanes == 0) delta[rows.statistic(0, seq)] = sum;
}

template <int N> __device__ void add(T* to, const A* from, Rows rows, bool onto) {
    A value[N], before[N];
    FOR_ELEMENTS(j, rows, N) {
        load(from + j, value);
        if (onto) {
            load(to + j, before);
            #pragma unroll
            for (int i = 0; i < N; i++) value[i] += before[i];
        }
        store(to + j, value);
    }
}

// to = from, or to += from, where from [S, B, heads, d] is C-contiguous and of the arithmetic type.
extern "C" __global__ void __launch_bounds__(256) narrow_heads(
    T* to, long long ts, long long tb, long long th, const A* from, long long onto, ROWS_PARAMETERS) {
    Rows rows = ROWS;
    if (!rows.active()) return;
    Strides strides = {ts, tb, th};
    if (aligned_rows(rows, strides, strides, to, from))
        add<VECTOR>(to + rows.at(strides), from + rows.item() * width, rows, onto);
    else
        add<1>(to + rows.at(strides), from + rows.item() * width, rows, onto);
}
