// Queries, keys and values of a packed row before attention, in place: bias, RMS norm per head, rotary positions.
//
// `lanes` threads (a power of two up to 32) share one head of d elements: element i and its partner i + d / 2 are one
// thread's. Where d is odd, which rotation does not allow, the last partner is absent.

struct Layout {
    long long batch, heads, kv_heads, width;  // width of a head

    __device__ long long all() const { return heads + 2 * kv_heads; }
    __device__ long long half() const { return (width + 1) / 2; }
};

template <class Op> __device__ inline A over_lanes(Op op, A value, int lanes) {
    for (int mask = lanes / 2; mask > 0; mask /= 2) value = op(value, __shfl_xor_sync(0xffffffffu, value, mask));
    return value;
}

// Second half of a pair: nothing is read or written beyond the head.
template <int N, class S> __device__ inline void load_second(const S* from, bool there, A (&to)[N]) {
    load_if(there ? from : (const S*)0, 0, to);
}

template <int N> __device__ inline void rotate(A (&first)[N], A (&second)[N], const A* cos, const A* sin, A sign) {
    A c[N], s[N];
    load(cos, c);
    load(sin, s);
    #pragma unroll
    for (int i = 0; i < N; i++) {
        A a = first[i] * c[i] - sign * second[i] * s[i];
        second[i] = second[i] * c[i] + sign * first[i] * s[i];
        first[i] = a;
    }
}

template <int N> __device__ void forward(
    T* qkv, const T* bias, const T* q_gain, const T* k_gain, A epsilon, const A* cos, const A* sin, T* saved, A* rstd,
    Layout layout, long long tokens, long long worked, int lanes) {
    long long item = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / lanes;
    bool active = item < tokens * worked;  // the others take part in the exchanges only
    long long token = active ? item / worked : 0, head = active ? item % worked : 0, half = layout.half();
    bool both = head < layout.heads + layout.kv_heads;
    T* x = qkv + (token * layout.all() + head) * layout.width;
    const T* gain = head < layout.heads ? q_gain : k_gain;
    A first[N], second[N], shift[N], square = 0, inverse = 1;
    for (long long i = threadIdx.x % lanes * N; active && i < half; i += lanes * N) {
        bool there = i + half < layout.width;
        load(x + i, first);
        load_second(x + i + half, there, second);
        if (bias) {
            load(bias + head * layout.width + i, shift);
            for (int e = 0; e < N; e++) first[e] += shift[e];
            load_second(bias + head * layout.width + i + half, there, shift);
            for (int e = 0; e < N; e++) second[e] += shift[e];
        }
        for (int e = 0; e < N; e++) square += stored(first[e]) * stored(first[e]) + stored(second[e]) * stored(second[e]);
        if (both && !gain && cos) rotate(first, second, cos + token / layout.batch * half + i, sin + token / layout.batch * half + i, (A)1);
        store(x + i, first);
        if (there) store(x + i + half, second);
    }
    if (!q_gain) return;
    inverse = 1 / sqrt(over_lanes(Sum(), square, lanes) / layout.width + epsilon);
    if (!active || !both) return;
    long long norms = layout.heads + layout.kv_heads;
    T* keep = saved + (token * norms + head) * layout.width;
    if (threadIdx.x % lanes == 0) rstd[token * norms + head] = inverse;
    for (long long i = threadIdx.x % lanes * N; i < half; i += lanes * N) {
        bool there = i + half < layout.width;
        load(x + i, first);
        store(keep + i, first);
        load_second(x + i + half, there, second);
        if (there) store(keep + i + half, second);
        load(gain + i, shift);
        for (int e = 0; e < N; e++) first[e] *= inverse * shift[e];
        load_second(gain + i + half, there, shift);
        for (int e = 0; e < N; e++) second[e] *= inverse * shift[e];
        if (cos) rotate(first, second, cos + token / layout.batch * half + i, sin + token / layout.batch * half + i, (A)1);
        store(x + i, first);
        if (there) store(x + i + half, second);
    }
}

// worked: heads per token that change, heads + kv_heads, or all where there is a bias.
extern "C" __global__ void __launch_bounds__(256) split_heads_forward(
    T* qkv, const T* bias, const T* q_gain, const T* k_gain, double epsilon, const A* cos, const A* sin, T* saved,
    A* rstd, long long batch, long long heads, long long kv_heads, long long width, long long tokens, long long worked,
    long long lanes) {
    Layout layout = {batch, heads, kv_heads, width};
    if (width % 2 == 0 && aligned(width / 2, qkv, bias, q_gain, k_gain, cos, sin, saved))
        forward<VECTOR>(qkv, bias, q_gain, k_gain, epsilon, cos, sin, saved, rstd, layout, tokens, worked, lanes);
    else
        forward<1>(qkv, bias, q_gain, k_gain, epsilon, cos, sin, saved, rstd, layout, tokens, worked, lanes);
}

template <int N> __device__ void backward(
    T* dqkv, const T* saved, const A* rstd, const T* q_gain, const T* k_gain, const A* cos, const A* sin,
    Layout layout, long long tokens, int lanes) {
    long long norms = layout.heads + layout.kv_heads, half = layout.half();
    long long item = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / lanes;
    bool active = item < tokens * norms;
    long long token = active ? item / norms : 0, head = active ? item % norms : 0;
    T* dx = dqkv + (token * layout.all() + head) * layout.width;
    const T* x = saved + (token * norms + head) * layout.width;
    const T* gain = head < layout.heads ? q_gain : k_gain;
    const A *c = cos + token / layout.batch * half, *s = sin + token / layout.batch * half;
    A inverse = saved && active ? rstd[token * norms + head] : (A)0;
    A first[N], second[N], value[N], factor[N], along = 0;
    // Two passes with a norm: the mean of gradient · normed first, then the gradient.
    for (int pass = saved ? 0 : 1; pass < 2; pass++) {
        for (long long i = threadIdx.x % lanes * N; active && i < half; i += lanes * N) {
            bool there = i + half < layout.width;
            load(dx + i, first);
            load_second(dx + i + half, there, second);
            if (cos) rotate(first, second, c + i, s + i, (A)-1);
            if (saved) {
                load(gain + i, factor);
                load(x + i, value);
                for (int e = 0; e < N; e++) {
                    first[e] *= factor[e];
                    if (pass == 0) along += first[e] * value[e] * inverse;
                    if (pass == 1) first[e] = (first[e] - value[e] * inverse * along) * inverse;
                }
                load_second(gain + i + half, there, factor);
                load_second(x + i + half, there, value);
                for (int e = 0; e < N; e++) {
                    second[e] *= factor[e];
                    if (pass == 0) along += second[e] * value[e] * inverse;
                    if (pass == 1) second[e] = (second[e] - value[e] * inverse * along) * inverse;
                }
            }
            if (pass == 0) continue;
            store(dx + i, first);
            if (there) store(dx + i + half, second);
        }
        if (pass == 0) along = over_lanes(Sum(), along, lanes) / layout.width;
    }
}

extern "C" __global__ void __launch_bounds__(256) split_heads_backward(
    T* dqkv, const T* saved, const A* rstd, const T* q_gain, const T* k_gain, const A* cos, const A* sin,
    long long batch, long long heads, long long kv_heads, long long width, long long tokens, long long lanes) {
    Layout layout = {batch, heads, kv_heads, width};
    if (width % 2 == 0 && aligned(width / 2, dqkv, saved, q_gain, k_gain, cos, sin))
        backward<VECTOR>(dqkv, saved, rstd, q_gain, k_gain, cos, sin, layout, tokens, lanes);
    else
        backward<1>(dqkv, saved, rstd, q_gain, k_gain, cos, sin, layout, tokens, lanes);
}

// Gradients of the two gains before `split_heads_backward` changes dqkv: a thread owns a pair of columns of one head
// and walks down the tokens. q_partials [gridDim.y, heads · d], k_partials [gridDim.y, kv_heads · d].
extern "C" __global__ void __launch_bounds__(256) split_heads_gains(
    const T* dqkv, const T* saved, const A* rstd, const A* cos, const A* sin, A* q_partials, A* k_partials,
    long long batch, long long heads, long long kv_heads, long long width, long long tokens) {
    Layout layout = {batch, heads, kv_heads, width};
    long long norms = heads + kv_heads, half = layout.half(), columns = norms * half;
    COLUMNS_OF_BLOCK(base, columns, 1) {
        long long column = base + threadIdx.x, head = column / half, i = column % half;
        bool there = i + half < width;
        A first_sum[1] = {}, second_sum[1] = {}, first[1], second[1];
        if (column < columns) {
            ROWS_OF_THREAD(token, tokens) {
                const T* dx = dqkv + (token * layout.all() + head) * width + i;
                const T* x = saved + (token * norms + head) * width + i;
                load(dx, first);
                load_second(dx + half, there, second);
                if (cos) rotate(first, second, cos + token / batch * half + i, sin + token / batch * half + i, (A)-1);
                A inverse = rstd[token * norms + head];
                first_sum[0] += first[0] * widen(*x) * inverse;
                if (there) second_sum[0] += second[0] * widen(x[half]) * inverse;
            }
        }
        // Pairs are put apart again; where a column lies among those of the queries or of the keys decides the target.
        bool query = head < heads;
        long long size = (query ? heads : kv_heads) * width, at = (query ? head : head - heads) * width + i;
        long long outside = 1ll << 62;
        store_partial(first_sum, q_partials, query && column < columns ? at : outside, size);
        store_partial(second_sum, q_partials, query && there && column < columns ? at + half : outside, size);
        store_partial(first_sum, k_partials, !query && column < columns ? at : outside, size);
        store_partial(second_sum, k_partials, !query && there && column < columns ? at + half : outside, size);
    }
}
