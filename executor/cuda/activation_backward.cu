// The gradient of any activation function from its derivative, and that of the bias.

template <int N> __device__ void backward(
    const T* dy, const T* derivative, T* dx, A* partials, long long rows, long long width) {
    COLUMNS_OF_BLOCK(base, width, N) {
        long long column = base + threadIdx.x * N;
        A sum[N] = {}, gradient[N], slope[N];
        if (column < width) {
            ROWS_OF_THREAD(row, rows) {
                load(dy + row * width + column, gradient);
                load(derivative + row * width + column, slope);
                #pragma unroll
                for (int i = 0; i < N; i++) sum[i] += gradient[i] *= slope[i];
                store(dx + row * width + column, gradient);
            }
        }
        if (partials) store_partial(sum, partials, column, width);
    }
}

extern "C" __global__ void __launch_bounds__(256) activation_backward(
    const T* dy, const T* derivative, T* dx, A* partials, long long rows, long long width) {
    if (aligned(width, dy, derivative, dx))
        backward<VECTOR>(dy, derivative, dx, partials, rows, width);
    else
        backward<1>(dy, derivative, dx, partials, rows, width);
}
