// Gated activation: x is [rows, 2 width], gate and up side by side.

template <int N> __device__ void gated(
    const T* x, const T* bias, T* out, long long rows, long long width) {
    COLUMNS_OF_BLOCK(base, width, N) {
        long long column = base + threadIdx.x * N;
        if (column >= width) continue;
        A gate_shift[N], up_shift[N], gate[N], up[N];
        load_if(bias, column, gate_shift);
        load_if(bias, width + column, up_shift);
        ROWS_OF_THREAD(row, rows) {
            load(x + 2 * row * width + column, gate);
            load(x + (2 * row + 1) * width + column, up);
            #pragma unroll
            for (int i = 0; i < N; i++) gate[i] = activation(gate[i] + gate_shift[i]).f * (up[i] + up_shift[i]);
            store(out + row * width + column, gate);
        }
    }
}

template <int N> __device__ void gated_back(
    const T* dy, const T* x, const T* bias, T* dx, A* partials, long long rows, long long width) {
    COLUMNS_OF_BLOCK(base, width, N) {
        long long column = base + threadIdx.x * N;
        A gate_sum[N] = {}, up_sum[N] = {};
        if (column < width) {
            A gate_shift[N], up_shift[N], gate[N], up[N], gradient[N];
            load_if(bias, column, gate_shift);
            load_if(bias, width + column, up_shift);
            ROWS_OF_THREAD(row, rows) {
                load(x + 2 * row * width + column, gate);
                load(x + (2 * row + 1) * width + column, up);
                load(dy + row * width + column, gradient);
                #pragma unroll
                for (int i = 0; i < N; i++) {
                    Value at = activation(gate[i] + gate_shift[i]);
                    gate_sum[i] += gate[i] = gradient[i] * (up[i] + up_shift[i]) * at.slope;
                    up_sum[i] += up[i] = gradient[i] * at.f;
                }
                store(dx + 2 * row * width + column, gate);
                store(dx + (2 * row + 1) * width + column, up);
            }
        }
        if (partials) {  // [gridDim.y, 2 width]: the gates' sums, then those of the ups
            store_partial(gate_sum, partials + (long long)blockIdx.y * width, column, width);
            store_partial(up_sum, partials + (long long)blockIdx.y * width + width, column, width);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) gated_forward(
    const T* x, const T* bias, T* out, long long rows, long long width) {
    if (aligned(width, x, bias, out))
        gated<VECTOR>(x, bias, out, rows, width);
    else
        gated<1>(x, bias, out, rows, width);
}

extern "C" __global__ void __launch_bounds__(256) gated_backward(
    const T* dy, const T* x, const T* bias, T* dx, A* partials, long long rows, long long width) {
    if (aligned(width, dy, x, bias, dx))
        gated_back<VECTOR>(dy, x, bias, dx, partials, rows, width);
    else
        gated_back<1>(dy, x, bias, dx, partials, rows, width);
}
