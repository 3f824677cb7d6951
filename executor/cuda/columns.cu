// Sums over the rows of a matrix in two stages, each in a fixed order.

template <int N> __device__ void sums(const T* x, A* partials, long long rows, long long width) {
    COLUMNS_OF_BLOCK(base, width, N) {
        long long column = base + threadIdx.x * N;
        A sum[N] = {}, value[N];
        if (column < width) {
            ROWS_OF_THREAD(row, rows) {
                load(x + row * width + column, value);
                #pragma unroll
                for (int i = 0; i < N; i++) sum[i] += value[i];
            }
        }
        store_partial(sum, partials, column, width);
    }
}

// First stage, where no other kernel reads the matrix anyway.
extern "C" __global__ void __launch_bounds__(256) column_sums(
    const T* x, A* partials, long long rows, long long width) {
    if (aligned(width, x))
        sums<VECTOR>(x, partials, rows, width);
    else
        sums<1>(x, partials, rows, width);
}

// Second stage: total [width] += sum over rows of partials [count, width]. A block is 32 columns by 8 rows.
extern "C" __global__ void __launch_bounds__(256) add_columns(
    const A* partials, long long count, long long width, G* total) {
    __shared__ A parts[8][32];
    long long column = (long long)blockIdx.x * 32 + threadIdx.x;
    A sum = 0;
    if (column < width)
        for (long long row = threadIdx.y; row < count; row += 8) sum += partials[row * width + column];
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < width) {
        for (int y = 1; y < 8; y++) sum += parts[y][threadIdx.x];
        narrow(widen(total[column]) + sum, total[column]);
    }
}
