// Token embedding of a range of vocabulary rows, and learned positions with token type and dropout.

template <int N> __device__ void gather(
    const long long* ids, const T* table, long long first, long long vocab, T* out, long long rows, long long width) {
    COLUMNS_OF_BLOCK(base, width, N) {
        long long column = base + threadIdx.x * N;
        if (column >= width) continue;
        A value[N];
        ROWS_OF_THREAD(row, rows) {
            long long id = ids[row] - first;
            bool here = id >= 0 && id < vocab;
            load_if(here ? table : (const T*)0, id * width + column, value);
            store(out + row * width + column, value);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) embedding_forward(
    const long long* ids, const T* table, long long first, long long vocab, T* out, long long rows, long long width) {
    if (aligned(width, table, out))
        gather<VECTOR>(ids, table, first, vocab, out, rows, width);
    else
        gather<1>(ids, table, first, vocab, out, rows, width);
}

// A block owns one row of the table: it looks through all ids in order and adds the gradients of its own.
template <int N> __device__ void scatter(
    const long long* ids, const T* dout, G* dtable, long long wanted, long long tokens, long long width) {
    __shared__ unsigned votes[MOST_THREADS / 32];
    COLUMNS_OF_BLOCK_Y(base, width, N) {
        long long column = base + threadIdx.x * N;
        bool inside = column < width, any = false;
        A sum[N] = {}, value[N];
        for (long long first = 0; first < tokens; first += blockDim.x) {
            long long token = first + threadIdx.x;
            unsigned vote = __ballot_sync(0xffffffffu, token < tokens && ids[token] == wanted);
            if (threadIdx.x % 32 == 0) votes[threadIdx.x / 32] = vote;
            __syncthreads();
            for (unsigned warp = 0; warp < blockDim.x / 32; warp++) {
                for (unsigned left = votes[warp]; left; left &= left - 1) {
                    any = true;
                    if (!inside) continue;
                    load(dout + (first + warp * 32 + __ffs(left) - 1) * width + column, value);
                    #pragma unroll
                    for (int i = 0; i < N; i++) sum[i] += value[i];
                }
            }
            __syncthreads();
        }
        if (any && inside) {
            load(dtable + column, value);
            #pragma unroll
            for (int i = 0; i < N; i++) sum[i] += value[i];
            store(dtable + column, sum);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) embedding_backward(
    const long long* ids, const T* dout, G* dtable, long long first, long long tokens, long long width) {
    G* row = dtable + blockIdx.x * width;
    if (aligned(width, dout, dtable))
        scatter<VECTOR>(ids, dout, row, first + blockIdx.x, tokens, width);
    else
        scatter<1>(ids, dout, row, first + blockIdx.x, tokens, width);
}

// ---- learned positions: rows of the matrix are tokens, s · batch + b -------------------------------------------------

struct Positions {
    const long long* positions;
    long long first, count;

    // Row of the table, or -1.
    __device__ long long row(long long s) const {
        long long at = positions[s] - first;
        return at >= 0 && at < count ? at : -1;
    }
};

template <int N> __device__ void add_positions(
    const T* x, const T* table, const T* type_row, Positions where, Dropout dropout, T* out, long long rows,
    long long width) {
    COLUMNS_OF_BLOCK(base, width, N) {
        long long column = base + threadIdx.x * N;
        if (column >= width) continue;
        A type[N], value[N], place[N];
        load_if(type_row, column, type);
        ROWS_OF_THREAD(row, rows) {
            long long at = table ? where.row((unsigned)row / dropout.batch) : -1;
            load(x + row * width + column, value);
            load_if(at >= 0 ? table : (const T*)0, at * width + column, place);
            #pragma unroll
            for (int i = 0; i < N; i++) value[i] += place[i] + type[i];
            dropout.apply(value, dropout.row(row), column);
            store(out + row * width + column, value);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) add_positions_forward(
    const T* x, const T* table, const T* type_row, long long first, long long count, DROPOUT_PARAMETERS, T* out,
    long long rows, long long width) {
    Positions where = {positions, first, count};
    if (aligned(width, x, table, type_row, out))
        add_positions<VECTOR>(x, table, type_row, where, DROPOUT, out, rows, width);
    else
        add_positions<1>(x, table, type_row, where, DROPOUT, out, rows, width);
}

// A thread walks down the positions; each position's row of the table is its alone, because positions are distinct.
template <int N> __device__ void add_positions_back(
    const T* dout, G* dtable, A* type_partials, Positions where, Dropout dropout, T* dx, long long seq,
    long long width) {
    COLUMNS_OF_BLOCK(base, width, N) {
        long long column = base + threadIdx.x * N;
        A type_sum[N] = {}, value[N];
        if (column < width) {
            ROWS_OF_THREAD(s, seq) {
                A sum[N] = {};
                for (unsigned b = 0; b < dropout.batch; b++) {
                    long long row = s * dropout.batch + b;
                    load(dout + row * width + column, value);
                    dropout.apply(value, dropout.row(row), column);
                    store(dx + row * width + column, value);
                    #pragma unroll
                    for (int i = 0; i < N; i++) sum[i] += value[i];
                }
                #pragma unroll
                for (int i = 0; i < N; i++) type_sum[i] += sum[i];
                long long at = dtable ? where.row(s) : -1;
                if (at < 0) continue;
                load(dtable + at * width + column, value);
                #pragma unroll
                for (int i = 0; i < N; i++) value[i] += sum[i];
                store(dtable + at * width + column, value);
            }
        }
        if (type_partials) store_partial(type_sum, type_partials, column, width);
    }
}

extern "C" __global__ void __launch_bounds__(256) add_positions_backward(
    const T* dout, G* dtable, A* type_partials, long long first, long long count, DROPOUT_PARAMETERS, T* dx,
    long long seq, long long width) {
    Positions where = {positions, first, count};
    if (aligned(width, dout, dtable, dx))
        add_positions_back<VECTOR>(dout, dtable, type_partials, where, DROPOUT, dx, seq, width);
    else
        add_positions_back<1>(dout, dtable, type_partials, where, DROPOUT, dx, seq, width);
}
