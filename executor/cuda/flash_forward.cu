// Attention in one pass over the keys, no score of which leaves the multiprocessor (Dao 2023, arXiv:2307.08691,
// algorithm 1): a block has 64 queries of one head, a warp 16 of them, and goes through the keys 64 at a time. Scores are
// in units of log 2. K of the next tile arrives while this tile's weights multiply V, V while Q multiplies K.

constexpr int ROWS = 16 * WARPS, KEYS = 64, SLICES = KEYS / 8;

struct Running { float max[2], sum[2]; };  // of the thread's two rows; the sum is spread over four lanes

// First tile at or after `tile` that one of the block's queries sees; whether all of them see all of it.
__device__ inline long long next_tile(
    long long tile, long long keys, const Mask& mask, Reach queries, bool& all) {
    for (; tile * KEYS < keys; tile++) {
        Reach reach = {0, 0};
        if (mask.limited) reach = reach_of<KEYS>(mask.k_positions, tile * KEYS, keys);
        all = (tile + 1) * KEYS <= keys && sees_all(mask, queries, reach);
        if (sees_some(mask, queries, reach)) break;
    }
    return tile;
}

// Turns scores into weights relative to the new maxima and rescales what is there.
__device__ inline void soften(float (&scores)[SLICES][4], Running& running, float (&out)[CHUNKS][4], float scale) {
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        float largest = running.max[half];
        #pragma unroll
        for (int n = 0; n < SLICES; n++)
            #pragma unroll
            for (int e = 0; e < 2; e++) largest = fmaxf(largest, scores[n][2 * half + e] * scale);
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        float shift = largest == -INFINITE ? 0 : largest, factor = exp2f(running.max[half] - shift);
        running.max[half] = largest;
        running.sum[half] *= factor;
        #pragma unroll
        for (int n = 0; n < SLICES; n++)
            #pragma unroll
            for (int e = 0; e < 2; e++) {
                float& score = scores[n][2 * half + e];
                score = exp2f(score * scale - shift);
                running.sum[half] += score;
            }
        #pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            out[c][2 * half] *= factor;
            out[c][2 * half + 1] *= factor;
        }
    }
}

// A step over one of several blocks of keys has a state, accumulator (unnormalised), running_max and running_sum, before
// and after; out and logsumexp are null. Over all keys at once those two are written, and the state is null. Strides of
// the output are those of the accumulator or of out.
extern "C" __global__ void __launch_bounds__(128) flash_forward(
    const T* q, long long qs, long long qb, long long qh, const T* k, long long ks, long long kb, long long kh,
    const T* v, long long vs, long long vb, long long vh, T* out, A* accumulator, long long os, long long ob,
    long long oh, A* running_max, A* running_sum, A* logsumexp, ATTENTION_PARAMETERS) {
    __shared__ __align__(16) T k_tile[KEYS * PITCH];
    __shared__ __align__(16) T v_tile[KEYS * PITCH];
    Mask mask = MASK;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    long long block = gridDim.x - 1 - blockIdx.x, first = block * ROWS, head = blockIdx.y, b = blockIdx.z;
    q += b * qb + head * qh;
    k += b * kb + kv_index[head] * kh;
    v += b * vb + kv_index[head] * vh;
    long long output = b * ob + head * oh;

    // A warp's queries as left operands, through the room of K.
    unsigned left[STEPS][4];
    fetch<ROWS>(k_tile, q, qs, first, queries, width);
    commit_copies();
    await_copies<0>();
    __syncthreads();
    #pragma unroll
    for (int step = 0; step < STEPS; step++) load_left(left[step], k_tile, warp * 16, step * 16);
    __syncthreads();

    float sums[CHUNKS][4] = {};
    Running running = {{-INFINITE, -INFINITE}, {0, 0}};
    long long row[2] = {first + warp * 16 + g, first + warp * 16 + g + 8}, statistics = (b * gridDim.y + head) * queries;
    unsigned long long dropped_row[2] = {0, 0};
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        if (row[half] >= queries) continue;
        if (threshold)
            dropped_row[half] = row_key(key, samples[b], q_positions[row[half]], head_ids[head]);
        if (logsumexp) continue;
        running.max[half] = running_max[statistics + row[half]] * LOG2_E;
        if (t == 0) running.sum[half] = running_sum[statistics + row[half]];
        #pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            for (int e = 0; e < 2; e++)
                if (c * 8 < width) sums[c][2 * half + e] = accumulator[output + row[half] * os + c * 8 + 2 * t + e];
    }

    Reach reach = {0, 0};
    if (limited) reach = reach_of<ROWS>(q_positions, first, queries);
    bool all = true, all_next = true;
    long long tile = next_tile(0, keys, mask, reach, all);
    if (tile * KEYS < keys) fetch<KEYS>(k_tile, k, ks, tile * KEYS, keys, width);
    commit_copies();
    while (tile * KEYS < keys) {
        await_copies<0>();
        __syncthreads();  // K is here, and nobody needs the last V
        fetch<KEYS>(v_tile, v, vs, tile * KEYS, keys, width);
        commit_copies();
        float scores[SLICES][4] = {};
        multiply_rows(scores, left, k_tile);
        if (!all) {
            #pragma unroll
            for (int n = 0; n < SLICES; n++)
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    long long column = tile * KEYS + n * 8 + 2 * t + i % 2;
                    bool hidden = column >= keys || (row[i / 2] < queries && mask.hides(row[i / 2], column));
                    if (hidden) scores[n][i] = -INFINITE;
                }
        }
        soften(scores, running, sums, (float)scale * LOG2_E);
        if (threshold) {
            #pragma unroll
            for (int n = 0; n < SLICES; n++)
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    long long column = tile * KEYS + n * 8 + 2 * t + i % 2;
                    if (column >= keys) continue;
                    scores[n][i] *= kept(dropped_row[i / 2], k_positions[column], (unsigned)threshold) ? (float)keep : 0;
                }
        }
        long long next = next_tile(tile + 1, keys, mask, reach, all_next);
        await_copies<0>();
        __syncthreads();  // V is here, and nobody needs this K
        if (next * KEYS < keys) fetch<KEYS>(k_tile, k, ks, next * KEYS, keys, width);
        commit_copies();
        multiply_columns(sums, scores, v_tile);
        tile = next;
        all = all_next;
    }

    float factor[2] = {1, 1};
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = running.sum[half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        if (logsumexp && total > 0) factor[half] = 1 / total;
        if (t != 0 || row[half] >= queries) continue;
        long long at = statistics + row[half];
        if (logsumexp) logsumexp[at] = total > 0 ? running.max[half] * LN_2 + log(total) : -INFINITE;
        if (logsumexp) continue;
        running_max[at] = running.max[half] * LN_2;
        running_sum[at] = total;
    }
    if (logsumexp) {
        T* room = k_tile + warp * 16 * PITCH;
        write_rows(out + output, os, first + warp * 16, queries, width, room, sums, factor, false);
        return;
    }
    #pragma unroll
    for (int c = 0; c < CHUNKS; c++)
        #pragma unroll
        for (int i = 0; i < 4; i++)
            if (c * 8 < width && row[i / 2] < queries)
                accumulator[output + row[i / 2] * os + c * 8 + 2 * t + i % 2] = sums[c][i];
}
