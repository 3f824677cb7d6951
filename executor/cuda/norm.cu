// Layer norm and RMS norm, alone and after bias, dropout and residual.
//
// Forward: a block per row. Backward: a block per row finds the two means that the gradient needs; then threads that
// own columns write the gradients and sum those of gain, shift and bias.

// Normalises a row that the calling thread's own stores may just have written: each thread reads its own columns only.
template <int N> __device__ void normalise(
    const T* x, const T* gamma, const T* beta, A epsilon, T* out, A* mean, A* rstd, long long width, bool rms) {
    A value[N], gain[N], shift[N], total = 0, square = 0, centre = 0;
    if (!rms) {
        for (long long j = threadIdx.x * N; j < width; j += blockDim.x * N) {
            load(x + j, value);
            #pragma unroll
            for (int i = 0; i < N; i++) total += value[i];
        }
        centre = over_block(Sum(), total) / width;
    }
    for (long long j = threadIdx.x * N; j < width; j += blockDim.x * N) {
        load(x + j, value);
        #pragma unroll
        for (int i = 0; i < N; i++) square += (value[i] - centre) * (value[i] - centre);
    }
    A inverse = 1 / sqrt(over_block(Sum(), square) / width + epsilon);
    for (long long j = threadIdx.x * N; j < width; j += blockDim.x * N) {
        load(x + j, value);
        load(gamma + j, gain);
        load_if(beta, j, shift);
        #pragma unroll
        for (int i = 0; i < N; i++) value[i] = (value[i] - centre) * inverse * gain[i] + shift[i];
        store(out + j, value);
    }
    if (threadIdx.x == 0) {
        *rstd = inverse;
        if (!rms) *mean = centre;
    }
}

extern "C" __global__ void __launch_bounds__(256) norm_forward(
    const T* x, const T* gamma, const T* beta, double epsilon, T* out, A* mean, A* rstd, long long width,
    long long rms) {
    long long row = blockIdx.x, at = row * width;
    if (aligned(width, x, gamma, beta, out))
        normalise<VECTOR>(x + at, gamma, beta, epsilon, out + at, mean + row, rstd + row, width, rms);
    else
        normalise<1>(x + at, gamma, beta, epsilon, out + at, mean + row, rstd + row, width, rms);
}

// ---- out = residual + dropout(x + bias) ------------------------------------------------------------------------------

template <int N> __device__ void residual(
    const T* x, const T* bias, const T* skip, Dropout dropout, T* out, long long rows, long long width) {
    COLUMNS_OF_BLOCK(base, width, N) {
        long long column = base + threadIdx.x * N;
        if (column >= width) continue;
        A shift[N], value[N], other[N];
        load_if(bias, column, shift);
        ROWS_OF_THREAD(row, rows) {
            load(x + row * width + column, value);
            load(skip + row * width + column, other);
            #pragma unroll
            for (int i = 0; i < N; i++) value[i] += shift[i];
            dropout.apply(value, dropout.row(row), column);
            #pragma unroll
            for (int i = 0; i < N; i++) value[i] += other[i];
            store(out + row * width + column, value);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) dropout_residual_forward(
    const T* x, const T* bias, const T* skip, DROPOUT_PARAMETERS, T* out, long long rows, long long width) {
    if (aligned(width, x, bias, skip, out))
        residual<VECTOR>(x, bias, skip, DROPOUT, out, rows, width);
    else
        residual<1>(x, bias, skip, DROPOUT, out, rows, width);
}

template <int N> __device__ void residual_back(
    const T* dout, Dropout dropout, T* dx, A* partials, long long rows, long long width) {
    COLUMNS_OF_BLOCK(base, width, N) {
        long long column = base + threadIdx.x * N;
        A sum[N] = {}, value[N];
        if (column < width) {
            ROWS_OF_THREAD(row, rows) {
                load(dout + row * width + column, value);
                dropout.apply(value, dropout.row(row), column);
                #pragma unroll
                for (int i = 0; i < N; i++) sum[i] += value[i];
                if (dx) store(dx + row * width + column, value);
            }
        }
        if (partials) store_partial(sum, partials, column, width);
    }
}

// dx is null where it would equal dout, in place.
extern "C" __global__ void __launch_bounds__(256) dropout_residual_backward(
    const T* dout, DROPOUT_PARAMETERS, T* dx, A* partials, long long rows, long long width) {
    if (aligned(width, dout, dx))
        residual_back<VECTOR>(dout, DROPOUT, dx, partials, rows, width);
    else
        residual_back<1>(dout, DROPOUT, dx, partials, rows, width);
}

// ---- both: stream = residual + dropout(x + bias), normed = norm(stream) ----------------------------------------------

template <int N> __device__ void residual_row(
    const T* x, const T* bias, const T* skip, Dropout dropout, unsigned long long key, T* stream, long long width) {
    A value[N], shift[N], other[N];
    for (long long j = threadIdx.x * N; j < width; j += blockDim.x * N) {
        load(x + j, value);
        load_if(bias, j, shift);
        load(skip + j, other);
        #pragma unroll
        for (int i = 0; i < N; i++) value[i] += shift[i];
        dropout.apply(value, key, j);
        #pragma unroll
        for (int i = 0; i < N; i++) value[i] += other[i];
        store(stream + j, value);
    }
}

extern "C" __global__ void __launch_bounds__(256) residual_norm_forward(
    const T* x, const T* bias, const T* skip, DROPOUT_PARAMETERS, const T* gamma, const T* beta, double epsilon,
    T* stream, T* normed, A* mean, A* rstd, long long width, long long rms) {
    long long row = blockIdx.x, at = row * width;
    Dropout dropout = DROPOUT;
    if (aligned(width, x, bias, skip, gamma, beta, stream, normed)) {
        residual_row<VECTOR>(x + at, bias, skip + at, dropout, dropout.row(row), stream + at, width);
        normalise<VECTOR>(stream + at, gamma, beta, epsilon, normed + at, mean + row, rstd + row, width, rms);
    } else {
        residual_row<1>(x + at, bias, skip + at, dropout, dropout.row(row), stream + at, width);
        normalise<1>(stream + at, gamma, beta, epsilon, normed + at, mean + row, rstd + row, width, rms);
    }
}

// ---- backward --------------------------------------------------------------------------------------------------------

template <int N> __device__ void row_means(
    const T* dy, const T* x, const T* gamma, A centre, A inverse, A* means, long long width, bool rms) {
    A gradient[N], value[N], gain[N], along = 0, plain = 0;
    for (long long j = threadIdx.x * N; j < width; j += blockDim.x * N) {
        load(dy + j, gradient);
        load(x + j, value);
        load(gamma + j, gain);
        #pragma unroll
        for (int i = 0; i < N; i++) {
            A g = gradient[i] * gain[i];
            along += g * (value[i] - centre) * inverse;
            plain += g;
        }
    }
    along = over_block(Sum(), along);
    plain = rms ? (A)0 : over_block(Sum(), plain);
    if (threadIdx.x == 0) {
        means[0] = along / width;
        means[1] = plain / width;
    }
}

// means [rows, 2]: of g · x̂ and of g, where g = dy · gamma; the second is 0 if rms.
extern "C" __global__ void __launch_bounds__(256) norm_row_means(
    const T* dy, const T* x, const T* gamma, const A* mean, const A* rstd, A* means, long long width, long long rms) {
    long long row = blockIdx.x, at = row * width;
    A centre = rms ? (A)0 : mean[row];
    if (aligned(width, dy, x, gamma))
        row_means<VECTOR>(dy + at, x + at, gamma, centre, rstd[row], means + 2 * row, width, rms);
    else
        row_means<1>(dy + at, x + at, gamma, centre, rstd[row], means + 2 * row, width, rms);
}

struct Partials { A *gamma, *beta, *bias; };  // null: not asked for

template <int N> __device__ void norm_back(
    const T* dy, const T* extra, const T* x, const T* gamma, const A* mean, const A* rstd, const A* means, T* d_stream,
    T* dx, Dropout dropout, Partials partials, long long rows, long long width, bool rms) {
    COLUMNS_OF_BLOCK(base, width, N) {
        long long column = base + threadIdx.x * N;
        A gamma_sum[N] = {}, beta_sum[N] = {}, bias_sum[N] = {};
        if (column < width) {
            A gain[N], gradient[N], value[N], other[N];
            load(gamma + column, gain);
            ROWS_OF_THREAD(row, rows) {
                long long at = row * width + column;
                A centre = rms ? (A)0 : mean[row], inverse = rstd[row], along = means[2 * row], plain = means[2 * row + 1];
                load(dy + at, gradient);
                load(x + at, value);
                load_if(extra, at, other);
                #pragma unroll
                for (int i = 0; i < N; i++) {
                    A normed = (value[i] - centre) * inverse;
                    gamma_sum[i] += gradient[i] * normed;
                    beta_sum[i] += gradient[i];
                    value[i] = (gradient[i] * gain[i] - normed * along - plain) * inverse + other[i];
                }
                store(d_stream + at, value);
                if (dx) {
                    dropout.apply(value, dropout.row(row), column);
                    store(dx + at, value);
                }
                #pragma unroll
                for (int i = 0; i < N; i++) bias_sum[i] += value[i];
            }
        }
        store_partial(gamma_sum, partials.gamma, column, width);
        if (partials.beta) store_partial(beta_sum, partials.beta, column, width);
        if (partials.bias) store_partial(bias_sum, partials.bias, column, width);
    }
}

// d_stream = norm'(dy) + extra, which may be null; dx = mask · d_stream where it is not null (then d_stream serves).
extern "C" __global__ void __launch_bounds__(256) norm_backward(
    const T* dy, const T* extra, const T* x, const T* gamma, const A* mean, const A* rstd, const A* means, T* d_stream,
    T* dx, DROPOUT_PARAMETERS, A* dgamma, A* dbeta, A* dbias, long long rows, long long width, long long rms) {
    Partials partials = {dgamma, dbeta, dbias};
    if (aligned(width, dy, extra, x, gamma, d_stream, dx))
        norm_back<VECTOR>(
            dy, extra, x, gamma, mean, rstd, means, d_stream, dx, DROPOUT, partials, rows, width, rms);
    else
        norm_back<1>(dy, extra, x, gamma, mean, rstd, means, d_stream, dx, DROPOUT, partials, rows, width, rms);
}
