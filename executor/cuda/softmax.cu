// Rows of attention scores: mask, softmax, dropout and their gradients; a block per query of a head of a sequence.
//
// Scores come scaled, in the arithmetic type; probabilities leave in the storage type (in place where the two are
// one). A tile holds the queries first .. first + gridDim.x of every head and sequence and the keys 0 .. keys.

// Where row i of head h of sequence b of a tile lies: at + (b · heads + h) · head + i · row elements.
struct Tile { long long head, row; };

struct Scores {
    long long keys, first, queries;  // columns of the tile; its first query; queries of the whole sequence
    Mask mask;
    unsigned threshold;
    A keep;
    unsigned long long key;
    const long long *samples, *heads;

    __device__ long long query() const { return first + blockIdx.x; }
    __device__ long long at(Tile tile) const {
        return ((long long)blockIdx.z * gridDim.y + blockIdx.y) * tile.head + blockIdx.x * tile.row;
    }
    // Index of this query in statistics [batch, heads, queries].
    __device__ long long statistic() const {
        return ((long long)blockIdx.z * gridDim.y + blockIdx.y) * queries + query();
    }
    __device__ unsigned long long dropout_row() const {
        if (threshold == 0) return 0;
        return row_key(key, samples[blockIdx.z], mask.q_positions[query()], heads[blockIdx.y]);
    }
    // -inf where the key is hidden.
    template <int N> __device__ void load_scores(const A* row, long long j, A (&values)[N]) const {
        load(row + j, values);
        #pragma unroll
        for (int i = 0; i < N; i++)
            if (mask.hides(query(), j + i)) values[i] = -INFINITE;
    }
    template <int N> __device__ void drop_keys(A (&values)[N], unsigned long long row, long long j) const {
        if (threshold == 0) return;
        #pragma unroll
        for (int i = 0; i < N; i++) values[i] *= kept(row, mask.k_positions[j + i], threshold) ? keep : (A)0;
    }
};

#define SCORES_PARAMETERS                                                                                      \
    long long keys, long long first, long long queries, long long back, long long ahead, const int *q_positions, \
        const int *k_positions, long long limited, long long threshold, double keep, unsigned long long key,      \
        const long long *samples, const long long *heads
#define SCORES                                                                                              \
    Scores {                                                                                                \
        keys, first, queries, {back, ahead, q_positions, k_positions, limited}, (unsigned)threshold, (A)keep, key, \
            samples, heads                                                                                  \
    }
#define FOR_KEYS(j, keys, N) for (long long j = threadIdx.x * N; j < keys; j += blockDim.x * N)

// Whether every row of the tiles allows 16-byte accesses.
template <class... P> __device__ bool aligned_tiles(long long keys, Tile a, Tile b, const P*... arrays) {
    return aligned(keys, arrays...) && (a.head | a.row | b.head | b.row) % VECTOR == 0;
}

template <int N> __device__ A largest_of(const A* row, const Scores& s, A start) {
    A values[N], largest = start;
    FOR_KEYS(j, s.keys, N) {
        s.load_scores(row, j, values);
        #pragma unroll
        for (int i = 0; i < N; i++) largest = fmax(largest, values[i]);
    }
    return over_block(Largest(), largest);
}

template <int N> __device__ A sum_of_exp(const A* row, const Scores& s, A shift) {
    A values[N], total = 0;
    FOR_KEYS(j, s.keys, N) {
        s.load_scores(row, j, values);
        #pragma unroll
        for (int i = 0; i < N; i++) total += exp(values[i] - shift);
    }
    return over_block(Sum(), total);
}

template <int N> __device__ void write_exp(
    const A* row, const Scores& s, A shift, A factor, T* probabilities, T* dropped) {
    A values[N];
    unsigned long long dropout = s.dropout_row();
    FOR_KEYS(j, s.keys, N) {
        s.load_scores(row, j, values);
        #pragma unroll
        for (int i = 0; i < N; i++) values[i] = exp(values[i] - shift) * factor;
        if (probabilities) store(probabilities + j, values);
        if (!dropped) continue;
        s.drop_keys(values, dropout, j);
        store(dropped + j, values);
    }
}

template <int N> __device__ void forward(
    const A* row, const Scores& s, T* probabilities, long long width, T* dropped, A* logsumexp) {
    A largest = largest_of<N>(row, s, -INFINITE);
    A shift = largest == -INFINITE ? (A)0 : largest;
    A total = sum_of_exp<N>(row, s, shift);
    write_exp<N>(row, s, shift, 1 / (total == 0 ? (A)1 : total), probabilities, dropped);
    if (probabilities)
        for (long long j = s.keys + threadIdx.x; j < width; j += blockDim.x) narrow((A)0, probabilities[j]);
    if (logsumexp && threadIdx.x == 0)
        logsumexp[s.statistic()] = total == 0 ? -INFINITE : shift + log(total);
}

// probabilities (null: not kept) are zero from the tile's keys up to `width`; dropped (null: no dropout) lies like
// scores; logsumexp [batch, heads, queries] or null.
extern "C" __global__ void __launch_bounds__(256) softmax_forward(
    const A* scores, long long s_head, long long s_row, T* probabilities, long long p_head, long long p_row,
    long long width, T* dropped, A* logsumexp, SCORES_PARAMETERS) {
    Scores s = SCORES;
    Tile from = {s_head, s_row}, to = {p_head, p_row};
    const A* row = scores + s.at(from);
    T* kept_row = probabilities ? probabilities + s.at(to) : probabilities;
    T* dropped_row = dropped ? dropped + s.at(from) : dropped;
    if (aligned_tiles(keys, from, to, scores, probabilities, dropped))
        forward<VECTOR>(row, s, kept_row, width, dropped_row, logsumexp);
    else
        forward<1>(row, s, kept_row, width, dropped_row, logsumexp);
}

// One block of keys for running statistics [batch, heads, queries]: weights = exp(score - new max) · dropout, lying like
// the scores; rescale = exp(old max - new max) is what the output so far is to be multiplied by.
template <int N> __device__ void step(
    const A* row, const Scores& s, T* weights, A* running_max, A* running_sum, A* rescale) {
    long long at = s.statistic();
    A before = running_max[at], largest = largest_of<N>(row, s, before);
    A shift = largest == -INFINITE ? (A)0 : largest;
    A total = sum_of_exp<N>(row, s, shift);
    if (s.threshold)
        write_exp<N>(row, s, shift, 1, (T*)0, weights);
    else
        write_exp<N>(row, s, shift, 1, weights, (T*)0);
    if (threadIdx.x == 0) {  // the sums' barriers are behind every thread's reading of the old maximum
        A factor = exp(before - shift);
        rescale[at] = factor;
        running_sum[at] = running_sum[at] * factor + total;
        running_max[at] = largest;
    }
}

extern "C" __global__ void __launch_bounds__(256) softmax_step(
    const A* scores, T* weights, long long s_head, long long s_row, A* running_max, A* running_sum, A* rescale,
    SCORES_PARAMETERS) {
    Scores s = SCORES;
    Tile tile = {s_head, s_row};
    long long at = s.at(tile);
    if (aligned_tiles(keys, tile, tile, scores, weights))
        step<VECTOR>(scores + at, s, weights + at, running_max, running_sum, rescale);
    else
        step<1>(scores + at, s, weights + at, running_max, running_sum, rescale);
}

// ---- backward: d_scores = p · (mask · d_probabilities - delta), without the scale ------------------------------------

template <int N> __device__ void backward(
    const T* p_row, const A* dp_row, const Scores& s, T* d_scores, T* dropped) {
    A p[N], dp[N], sum = 0;
    unsigned long long dropout = s.dropout_row();
    FOR_KEYS(j, s.keys, N) {
        load(p_row + j, p);
        load(dp_row + j, dp);
        s.drop_keys(dp, dropout, j);
        #pragma unroll
        for (int i = 0; i < N; i++) sum += p[i] * dp[i];
    }
    A delta = over_block(Sum(), sum);
    FOR_KEYS(j, s.keys, N) {
        load(p_row + j, p);
        load(dp_row + j, dp);
        s.drop_keys(dp, dropout, j);
        #pragma unroll
        for (int i = 0; i < N; i++) dp[i] = p[i] * (dp[i] - delta);
        store(d_scores + j, dp);
        if (!dropped) continue;
        s.drop_keys(p, dropout, j);
        store(dropped + j, p);
    }
}

// From probabilities that were kept. d_scores and dropped (null: no dropout) lie like d_probabilities.
extern "C" __global__ void __launch_bounds__(256) softmax_backward(
    const T* probabilities, long long p_head, long long p_row, const A* d_probabilities, long long s_head,
    long long s_row, T* d_scores, T* dropped, SCORES_PARAMETERS) {
    Scores s = SCORES;
    Tile from = {p_head, p_row}, tile = {s_head, s_row};
    long long at = s.at(tile);
    T* dropped_row = dropped ? dropped + at : dropped;
    if (aligned_tiles(keys, from, tile, probabilities, d_probabilities, d_scores, dropped))
        backward<VECTOR>(probabilities + s.at(from), d_probabilities + at, s, d_scores + at, dropped_row);
    else
        backward<1>(probabilities + s.at(from), d_probabilities + at, s, d_scores + at, dropped_row);
}

template <int N> __device__ void rebuild(
    const A* row, const A* dp_row, const Scores& s, A logsumexp, A delta, T* dropped, T* d_scores) {
    A p[N], dp[N];
    A shift = logsumexp == -INFINITE ? (A)0 : logsumexp;
    unsigned long long dropout = s.dropout_row();
    FOR_KEYS(j, s.keys, N) {
        s.load_scores(row, j, p);
        load(dp_row + j, dp);
        s.drop_keys(dp, dropout, j);
        #pragma unroll
        for (int i = 0; i < N; i++) {
            p[i] = exp(p[i] - shift);
            dp[i] = p[i] * (dp[i] - delta);
        }
        store(d_scores + j, dp);
        s.drop_keys(p, dropout, j);
        store(dropped + j, p);
    }
}

// From scores computed again; logsumexp and delta [batch, heads, queries]. All tiles lie alike.
extern "C" __global__ void __launch_bounds__(256) softmax_rebuild(
    const A* scores, const A* d_probabilities, long long s_head, long long s_row, const A* logsumexp, const A* delta,
    T* dropped, T* d_scores, SCORES_PARAMETERS) {
    Scores s = SCORES;
    Tile tile = {s_head, s_row};
    long long at = s.at(tile), row = s.statistic();
    if (aligned_tiles(keys, tile, tile, scores, d_probabilities, dropped, d_scores))
        rebuild<VECTOR>(scores + at, d_probabilities + at, s, logsumexp[row], delta[row], dropped + at, d_scores + at);
    else
        rebuild<1>(scores + at, d_probabilities + at, s, logsumexp[row], delta[row], dropped + at, d_scores + at);
}
