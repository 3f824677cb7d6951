// Gradients of attention from logsumexp and delta, scores computed again (Dao 2023, arXiv:2307.08691, algorithm 2), in
// two kernels: one whose blocks own queries and write dq, one whose blocks own keys and write dk and dv. The published
// single kernel adds to dq from many blocks at once, in an order that changes from run to run; this costs 7 products
// where that has 5. Tiles of the other side are 32 rows, the next of which arrive while these are multiplied.

constexpr int ROWS = 16 * WARPS, OTHERS = 32, SLICES = OTHERS / 8;

struct Gradient { float p, ds; };  // the weight after dropout, and the gradient of the unscaled score

// of one score, from its product, that of dout and v, and its row's statistics.
__device__ inline Gradient gradient_of(
    float score, float d_weight, bool hidden, float scale, float logsumexp, float delta, float mask) {
    float p = hidden ? 0 : exp2f((score * scale - logsumexp) * LOG2_E);
    return {p * mask, p * (d_weight * mask - delta)};
}

__device__ inline float finite(float logsumexp) { return logsumexp == -INFINITE ? 0 : logsumexp; }

// ---- dq --------------------------------------------------------------------------------------------------------------

__device__ inline long long next_keys(long long tile, long long keys, const Mask& mask, Reach queries) {
    if (!mask.limited) return tile;
    for (; tile * OTHERS < keys; tile++)
        if (sees_some(mask, queries, reach_of<OTHERS>(mask.k_positions, tile * OTHERS, keys))) break;
    return tile;
}

extern "C" __global__ void __launch_bounds__(128) flash_backward_queries(
    const T* dout, long long gs, long long gb, long long gh, const T* q, long long qs, long long qb, long long qh,
    const T* k, long long ks, long long kb, long long kh, const T* v, long long vs, long long vb, long long vh, T* dq,
    long long ds, long long db, long long dh, const A* logsumexp, const A* delta, long long onto,
    ATTENTION_PARAMETERS) {
    __shared__ __align__(16) T tiles[4 * OTHERS * PITCH];  // K and V, twice; before, 64 rows of q and of dout
    Mask mask = MASK;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    long long first = (long long)(gridDim.x - 1 - blockIdx.x) * ROWS, head = blockIdx.y, b = blockIdx.z;
    k += b * kb + kv_index[head] * kh;
    v += b * vb + kv_index[head] * vh;

    unsigned q_left[STEPS][4], g_left[STEPS][4];
    fetch<ROWS>(tiles, q + b * qb + head * qh, qs, first, queries, width);
    fetch<ROWS>(tiles + ROWS * PITCH, dout + b * gb + head * gh, gs, first, queries, width);
    commit_copies();
    await_copies<0>();
    __syncthreads();
    #pragma unroll
    for (int step = 0; step < STEPS; step++) {
        load_left(q_left[step], tiles, warp * 16, step * 16);
        load_left(g_left[step], tiles + ROWS * PITCH, warp * 16, step * 16);
    }
    __syncthreads();

    float sums[CHUNKS][4] = {}, row_lse[2] = {0, 0}, row_delta[2] = {0, 0};
    long long row[2] = {first + warp * 16 + g, first + warp * 16 + g + 8};
    unsigned long long dropped_row[2] = {0, 0};
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        if (row[half] >= queries) continue;
        long long at = (b * gridDim.y + head) * queries + row[half];
        row_lse[half] = finite(logsumexp[at]);
        row_delta[half] = delta[at];
        if (threshold) dropped_row[half] = row_key(key, samples[b], q_positions[row[half]], head_ids[head]);
    }

    Reach reach = {0, 0};
    if (limited) reach = reach_of<ROWS>(q_positions, first, queries);
    auto start = [&](long long tile, int stage) {
        if (tile * OTHERS < keys) {
            fetch<OTHERS>(tiles + 2 * stage * OTHERS * PITCH, k, ks, tile * OTHERS, keys, width);
            fetch<OTHERS>(tiles + (2 * stage + 1) * OTHERS * PITCH, v, vs, tile * OTHERS, keys, width);
        }
        commit_copies();
    };
    long long tile = next_keys(0, keys, mask, reach);
    start(tile, 0);
    for (int stage = 0; tile * OTHERS < keys; stage ^= 1) {
        long long next = next_keys(tile + 1, keys, mask, reach);
        start(next, stage ^ 1);
        await_copies<1>();
        __syncthreads();
        const T *k_tile = tiles + 2 * stage * OTHERS * PITCH, *v_tile = k_tile + OTHERS * PITCH;
        float scores[SLICES][4] = {}, gradients[SLICES][4] = {};
        multiply_rows(scores, q_left, k_tile);
        multiply_rows(gradients, g_left, v_tile);
        #pragma unroll
        for (int n = 0; n < SLICES; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                long long column = tile * OTHERS + n * 8 + 2 * t + i % 2;
                bool outside = column >= keys || row[i / 2] >= queries;
                float factor = 1;
                if (threshold && !outside)
                    factor = kept(dropped_row[i / 2], k_positions[column], (unsigned)threshold) ? (float)keep : 0;
                gradients[n][i] = gradient_of(
                    scores[n][i], gradients[n][i], outside || mask.hides(row[i / 2], column), scale, row_lse[i / 2],
                    row_delta[i / 2], factor).ds;
            }
        multiply_columns(sums, gradients, k_tile);
        __syncthreads();  // nobody needs this stage
        tile = next;
    }
    float factor[2] = {(float)scale, (float)scale};
    write_rows(
        dq + b * db + head * dh, ds, first + warp * 16, queries, width, tiles + warp * 16 * PITCH, sums, factor, onto);
}

// ---- dk and dv -------------------------------------------------------------------------------------------------------

struct Turn { long long head, tile; };  // a block of keys meets every tile of every query head that reads them

__device__ inline Turn next_queries(
    Turn turn, long long heads, long long kv, const long long* kv_index, long long queries, const Mask& mask,
    Reach keys) {
    for (; turn.head < heads; turn.head++, turn.tile = 0) {
        if (kv_index[turn.head] != kv) continue;
        for (; turn.tile * OTHERS < queries; turn.tile++) {
            if (!mask.limited) return turn;
            if (sees_some(mask, reach_of<OTHERS>(mask.q_positions, turn.tile * OTHERS, queries), keys)) return turn;
        }
    }
    return turn;
}

struct QueryRow { float logsumexp, delta; unsigned long long dropped; };

extern "C" __global__ void __launch_bounds__(128) flash_backward_keys(
    const T* dout, long long gs, long long gb, long long gh, const T* q, long long qs, long long qb, long long qh,
    const T* k, long long ks, long long kb, long long kh, const T* v, long long vs, long long vb, long long vh, T* dk,
    long long dks, long long dkb, long long dkh, T* dv, long long dvs, long long dvb, long long dvh,
    const A* logsumexp, const A* delta, long long onto, long long heads, ATTENTION_PARAMETERS) {
    DYNAMIC_SHARED(T, memory);  // K, V: 64 rows each; q, dout: 32 rows each, twice
    __shared__ QueryRow query_rows[2][OTHERS];
    T *k_tile = memory, *v_tile = memory + ROWS * PITCH, *others = memory + 2 * ROWS * PITCH;
    Mask mask = MASK;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    long long first = (long long)blockIdx.x * ROWS, kv = blockIdx.y, b = blockIdx.z;
    fetch<ROWS>(k_tile, k + b * kb + kv * kh, ks, first, keys, width);
    fetch<ROWS>(v_tile, v + b * vb + kv * vh, vs, first, keys, width);

    Reach reach = {0, 0};
    if (limited) reach = reach_of<ROWS>(k_positions, first, keys);
    auto start = [&](Turn turn, int stage) {
        if (turn.head < heads) {
            T* tile = others + 2 * stage * OTHERS * PITCH;
            fetch<OTHERS>(tile, q + b * qb + turn.head * qh, qs, turn.tile * OTHERS, queries, width);
            fetch<OTHERS>(
                tile + OTHERS * PITCH, dout + b * gb + turn.head * gh, gs, turn.tile * OTHERS, queries, width);
            long long row = turn.tile * OTHERS + threadIdx.x;
            if (threadIdx.x < OTHERS && row < queries) {
                long long at = (b * heads + turn.head) * queries + row;
                unsigned long long dropped =
                    threshold ? row_key(key, samples[b], q_positions[row], head_ids[turn.head]) : 0;
                query_rows[stage][threadIdx.x] = {finite(logsumexp[at]), (float)delta[at], dropped};
            }
        }
        commit_copies();
    };
    float dk_sums[CHUNKS][4] = {}, dv_sums[CHUNKS][4] = {};
    Turn turn = next_queries({0, 0}, heads, kv, kv_index, queries, mask, reach);
    start(turn, 0);
    for (int stage = 0; turn.head < heads; stage ^= 1) {
        Turn next = next_queries({turn.head, turn.tile + 1}, heads, kv, kv_index, queries, mask, reach);
        start(next, stage ^ 1);
        await_copies<1>();
        __syncthreads();
        const T *q_tile = others + 2 * stage * OTHERS * PITCH, *g_tile = q_tile + OTHERS * PITCH;
        float scores[SLICES][4] = {}, gradients[SLICES][4] = {};  // keys down, queries across
        multiply_rows(scores, k_tile, warp * 16, q_tile);
        multiply_rows(gradients, v_tile, warp * 16, g_tile);
        #pragma unroll
        for (int n = 0; n < SLICES; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                int across = n * 8 + 2 * t + i % 2;
                long long column = first + warp * 16 + g + i / 2 * 8, row = turn.tile * OTHERS + across;
                bool outside = column >= keys || row >= queries;
                QueryRow at = query_rows[stage][across];
                float factor = 1;
                if (threshold && !outside)
                    factor = kept(at.dropped, k_positions[column], (unsigned)threshold) ? (float)keep : 0;
                Gradient found = gradient_of(
                    scores[n][i], gradients[n][i], outside || mask.hides(row, column), scale, outside ? 0 : at.logsumexp,
                    outside ? 0 : at.delta, factor);
                scores[n][i] = found.p;
                gradients[n][i] = found.ds;
            }
        multiply_columns(dv_sums, scores, g_tile);
        multiply_columns(dk_sums, gradients, q_tile);
        __syncthreads();  // nobody needs this stage
        turn = next;
    }
    await_copies<0>();
    __syncthreads();
    float one[2] = {1, 1}, factor[2] = {(float)scale, (float)scale};
    T* room = k_tile + warp * 16 * PITCH;
    write_rows(dk + b * dkb + kv * dkh, dks, first + warp * 16, keys, width, room, dk_sums, factor, onto);
    write_rows(dv + b * dvb + kv * dvh, dvs, first + warp * 16, keys, width, room, dv_sums, one, onto);
}
