// An activation function with bias.

template <int N> __device__ void forward(
    const T* x, const T* bias, T* out, T* derivative, long long rows, long long width) {
    COLUMNS_OF_BLOCK(base, width, N) {
        long long column = base + threadIdx.x * N;
        if (column >= width) continue;
        A shift[N], value[N], slope[N];
        load_if(bias, column, shift);
        ROWS_OF_THREAD(row, rows) {
            load(x + row * width + column, value);
            #pragma unroll
            for (int i = 0; i < N; i++) {
                Value at = activation(value[i] + shift[i]);
                value[i] = at.f;
                slope[i] = at.slope;
            }
            store(out + row * width + column, value);
            store(derivative + row * width + column, slope);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) activation_forward(
    const T* x, const T* bias, T* out, T* derivative, long long rows, long long width) {
    if (aligned(width, x, bias, out, derivative))
        forward<VECTOR>(x, bias, out, derivative, rows, width);
    else
        forward<1>(x, bias, out, derivative, rows, width);
}
