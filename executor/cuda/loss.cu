// Softmax cross-entropy over a vocabulary that may be split by columns over ranks; a block per token.
//
// A vocabulary is seldom a multiple of 16 bytes wide: each row has a few single elements, 16-byte ones, then the rest.

template <class F> __device__ inline void for_each(T* row, long long width, F f) {
    long long lead = (16 - (reinterpret_cast<unsigned long long>(row) & 15)) % 16 / sizeof(T);
    if (lead > width) lead = width;
    long long packs = (width - lead) / VECTOR, tail = lead + packs * VECTOR;
    A one[1], many[VECTOR];
    for (long long j = threadIdx.x; j < lead + width - tail; j += blockDim.x) {
        long long column = j < lead ? j : j - lead + tail;
        load(row + column, one);
        if (f(column, one[0])) store(row + column, one);
    }
    for (long long pack = threadIdx.x; pack < packs; pack += blockDim.x) {
        long long column = lead + pack * VECTOR;
        load(row + column, many);
        bool changed = false;
        #pragma unroll
        for (int i = 0; i < VECTOR; i++) changed |= f(column + i, many[i]);
        if (changed) store(row + column, many);
    }
}

extern "C" __global__ void __launch_bounds__(256) cross_entropy_max(
    T* logits, const T* bias, A* out_max, long long width) {
    A largest = -INFINITE;
    for_each(logits + blockIdx.x * width, width, [&](long long column, A& value) {
        if (bias) value = stored(value + widen(bias[column]));
        largest = fmax(largest, value);
        return bias != 0;
    });
    largest = over_block(Largest(), largest);
    if (threadIdx.x == 0) out_max[blockIdx.x] = largest;
}

// stats [rows, 2]: the sum of the exponentials; the target's logit minus row_max, or 0 where another shard owns it.
extern "C" __global__ void __launch_bounds__(256) cross_entropy_sum(
    T* logits, const A* row_max, const long long* targets, long long first, A* stats, long long width) {
    long long target = targets[blockIdx.x] - first;
    A largest = row_max[blockIdx.x], total = 0;
    A* mine = stats + 2 * (long long)blockIdx.x;
    for_each(logits + blockIdx.x * width, width, [&](long long column, A& value) {
        value -= largest;
        if (column == target) mine[1] = value;
        value = exp(value);
        total += value;
        return true;
    });
    total = over_block(Sum(), total);
    if (threadIdx.x == 0) {
        mine[0] = total;
        if (target < 0 || target >= width) mine[1] = 0;
    }
}

// One block: the sum is taken in one order.
extern "C" __global__ void __launch_bounds__(256) cross_entropy_loss(
    const A* stats, const A* weights, double* loss, long long rows) {
    double sum = 0;
    for (long long row = threadIdx.x; row < rows; row += blockDim.x) {
        A weight = weights[row];
        if (weight != 0) sum += weight * (log((double)stats[2 * row]) - stats[2 * row + 1]);
    }
    sum = over_block(Sum(), sum);
    if (threadIdx.x == 0) *loss = sum;
}

extern "C" __global__ void __launch_bounds__(256) cross_entropy_backward(
    T* exponentials, const A* stats, const long long* targets, long long first, const A* weights, double scale,
    long long width) {
    long long target = targets[blockIdx.x] - first;
    A weight = weights[blockIdx.x] * (A)scale;
    A factor = weight == 0 ? (A)0 : weight / stats[2 * (long long)blockIdx.x];
    for_each(exponentials + blockIdx.x * width, width, [&](long long column, A& value) {
        value = weight == 0 ? (A)0 : value * factor - (column == target ? weight : (A)0);
        return true;
    });
}
