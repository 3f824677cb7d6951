// Optimizer updates on flat arrays, each read once and written once, and the sums that clipping needs.
//
// Parameters and their state are of the arithmetic type; `working` is the copy in the storage type that the kernels
// read, or null.

#define ELEMENTS_OF_THREAD(i, n, N)                                                                  \
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * N; i < n; \
         i += (long long)gridDim.x * blockDim.x * N)

template <class... P> __device__ inline bool aligned_flat(const P*... arrays) { return aligned(VECTOR, arrays...); }

template <int N> __device__ void sgd_step(A* param, const A* grad, A rate, T* working, long long first, long long n) {
    A p[N], g[N];
    ELEMENTS_OF_THREAD(i, n - first, N) {
        load(param + first + i, p);
        load(grad + first + i, g);
        #pragma unroll
        for (int e = 0; e < N; e++) p[e] -= rate * g[e];
        store(param + first + i, p);
        if (working) store(working + first + i, p);
    }
}

extern "C" __global__ void __launch_bounds__(256) sgd(
    A* param, const A* grad, double rate, T* working, long long n) {
    long long body = aligned_flat(param, grad, working) ? n / VECTOR * VECTOR : 0;
    sgd_step<VECTOR>(param, grad, rate, working, 0, body);
    sgd_step<1>(param, grad, rate, working, body, n);
}

struct Adam { A shrink, rise1, beta2, rise2, root_scale, rate, epsilon; };

template <int N> __device__ void adam_step(
    A* param, const A* grad, A* mean, A* square, Adam c, T* working, long long first, long long n) {
    A p[N], g[N], m[N], v[N];
    ELEMENTS_OF_THREAD(i, n - first, N) {
        load(param + first + i, p);
        load(grad + first + i, g);
        load(mean + first + i, m);
        load(square + first + i, v);
        #pragma unroll
        for (int e = 0; e < N; e++) {
            m[e] += (g[e] - m[e]) * c.rise1;
            v[e] = v[e] * c.beta2 + c.rise2 * g[e] * g[e];
            p[e] = p[e] * c.shrink - c.rate * m[e] / (sqrt(v[e]) * c.root_scale + c.epsilon);
        }
        store(param + first + i, p);
        store(mean + first + i, m);
        store(square + first + i, v);
        if (working) store(working + first + i, p);
    }
}

extern "C" __global__ void __launch_bounds__(256) adamw(
    A* param, const A* grad, A* mean, A* square, double shrink, double rise1, double beta2, double rise2,
    double root_scale, double rate, double epsilon, T* working, long long n) {
    Adam c = {(A)shrink, (A)rise1, (A)beta2, (A)rise2, (A)root_scale, (A)rate, (A)epsilon};
    long long body = aligned_flat(param, grad, mean, square, working) ? n / VECTOR * VECTOR : 0;
    adam_step<VECTOR>(param, grad, mean, square, c, working, 0, body);
    adam_step<1>(param, grad, mean, square, c, working, body, n);
}

template <int N> __device__ void scale_from(T* grad, A factor, long long first, long long n) {
    A g[N];
    ELEMENTS_OF_THREAD(i, n - first, N) {
        load(grad + first + i, g);
        #pragma unroll
        for (int e = 0; e < N; e++) g[e] *= factor;
        store(grad + first + i, g);
    }
}

extern "C" __global__ void __launch_bounds__(256) scale(T* grad, double factor, long long n) {
    long long body = aligned_flat(grad) ? n / VECTOR * VECTOR : 0;
    scale_from<VECTOR>(grad, factor, 0, body);
    scale_from<1>(grad, factor, body, n);
}

template <int N> __device__ double squares_from(const T* grad, long long first, long long n) {
    A g[N];
    double sum = 0;
    ELEMENTS_OF_THREAD(i, n - first, N) {
        load(grad + first + i, g);
        #pragma unroll
        for (int e = 0; e < N; e++) sum += (double)g[e] * g[e];
    }
    return sum;
}

// First stage: partials [gridDim.x]. The grid follows from n alone, and so does the order of the sums.
extern "C" __global__ void __launch_bounds__(256) sum_of_squares(const T* grad, double* partials, long long n) {
    long long body = aligned_flat(grad) ? n / VECTOR * VECTOR : 0;
    double sum = squares_from<VECTOR>(grad, 0, body) + squares_from<1>(grad, body, n);
    sum = over_block(Sum(), sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256) sum_partials(const double* partials, long long count, double* total) {
    double sum = 0;
    for (long long i = threadIdx.x; i < count; i += blockDim.x) sum += partials[i];
    sum = over_block(Sum(), sum);
    if (threadIdx.x == 0) *total = sum;
}
