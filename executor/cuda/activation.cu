// Activation functions with bias, plain and gated: value and derivative in one pass.

enum Kind { GELU, GELU_TANH, RELU, SILU };

struct Value { A f, slope; };

__device__ inline A sigmoid(A x) { return 1 / (1 + exp(-x)); }

template <int KIND> __device__ inline Value activation(A x) {
    if (KIND == GELU) {
        A below = (A)0.5 * (1 + erf(x * (A)0.70710678118654752440));
        A density = exp((A)-0.5 * x * x) * (A)0.39894228040143267794;
        return {x * below, below + x * density};
    }
    if (KIND == RELU) return {x <= 0 ? (A)0 : x, (A)(x > 0)};  // NaN stays NaN
    A u = x, du = 1;
    if (KIND == GELU_TANH) {  // (1 + tanh(v)) / 2 = sigmoid(2 v)
        u = x * ((A)1.5957691216057308 + (A)0.07135481627260025 * x * x);
        du = (A)1.5957691216057308 + (A)0.21406444881780074 * x * x;
    }
    A gate = sigmoid(u);
    return {x * gate, gate + x * gate * (1 - gate) * du};
}

template <int KIND, int N> __device__ void forward(
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
                Value at = activation<KIND>(value[i] + shift[i]);
                value[i] = at.f;
                slope[i] = at.slope;
            }
            store(out + row * width + column, value);
            store(derivative + row * width + column, slope);
        }
    }
}

template <int KIND> __device__ void forward_of_kind(
    const T* x, const T* bias, T* out, T* derivative, long long rows, long long width) {
    if (aligned(width, x, bias, out, derivative))
        forward<KIND, VECTOR>(x, bias, out, derivative, rows, width);
    else
        forward<KIND, 1>(x, bias, out, derivative, rows, width);
}

extern "C" __global__ void __launch_bounds__(256) activation_forward(
    const T* x, const T* bias, long long kind, T* out, T* derivative, long long rows, long long width) {
    if (kind == GELU) forward_of_kind<GELU>(x, bias, out, derivative, rows, width);
    if (kind == GELU_TANH) forward_of_kind<GELU_TANH>(x, bias, out, derivative, rows, width);
    if (kind == RELU) forward_of_kind<RELU>(x, bias, out, derivative, rows, width);
    if (kind == SILU) forward_of_kind<SILU>(x, bias, out, derivative, rows, width);
}

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

// ---- gated: x is [rows, 2 width], gate and up side by side -----------------------------------------------------------

template <int KIND, int N> __device__ void gated(
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
            for (int i = 0; i < N; i++) gate[i] = activation<KIND>(gate[i] + gate_shift[i]).f * (up[i] + up_shift[i]);
            store(out + row * width + column, gate);
        }
    }
}

template <int KIND, int N> __device__ void gated_back(
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
                    Value at = activation<KIND>(gate[i] + gate_shift[i]);
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

template <int KIND> __device__ void gated_of_kind(
    const T* dy, const T* x, const T* bias, T* out, A* partials, long long rows, long long width, bool back) {
    bool wide = aligned(width, dy, x, bias, out);
    if (back && wide) gated_back<KIND, VECTOR>(dy, x, bias, out, partials, rows, width);
    if (back && !wide) gated_back<KIND, 1>(dy, x, bias, out, partials, rows, width);
    if (!back && wide) gated<KIND, VECTOR>(x, bias, out, rows, width);
    if (!back && !wide) gated<KIND, 1>(x, bias, out, rows, width);
}

extern "C" __global__ void __launch_bounds__(256) gated_forward(
    const T* x, const T* bias, long long kind, T* out, long long rows, long long width) {
    if (kind == GELU) gated_of_kind<GELU>((const T*)0, x, bias, out, (A*)0, rows, width, false);
    if (kind == GELU_TANH) gated_of_kind<GELU_TANH>((const T*)0, x, bias, out, (A*)0, rows, width, false);
    if (kind == RELU) gated_of_kind<RELU>((const T*)0, x, bias, out, (A*)0, rows, width, false);
    if (kind == SILU) gated_of_kind<SILU>((const T*)0, x, bias, out, (A*)0, rows, width, false);
}

extern "C" __global__ void __launch_bounds__(256) gated_backward(
    const T* dy, const T* x, const T* bias, long long kind, T* dx, A* partials, long long rows, long long width) {
    if (kind == GELU) gated_of_kind<GELU>(dy, x, bias, dx, partials, rows, width, true);
    if (kind == GELU_TANH) gated_of_kind<GELU_TANH>(dy, x, bias, dx, partials, rows, width, true);
    if (kind == RELU) gated_of_kind<RELU>(dy, x, bias, dx, partials, rows, width, true);
    if (kind == SILU) gated_of_kind<SILU>(dy, x, bias, dx, partials, rows, width, true);
}
