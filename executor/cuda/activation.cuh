// One activation function, value and derivative in one pass. The compiler's options name it, ACTIVATION, of the kinds
// below: all in one kernel take NVRTC forty times as long, ten seconds and more that a first step would wait for.

enum Kind { GELU, GELU_TANH, RELU, SILU };

struct Value { A f, slope; };

__device__ inline A sigmoid(A x) { return 1 / (1 + exp(-x)); }

__device__ inline Value activation(A x) {
    if constexpr (ACTIVATION == GELU) {
        A below = (A)0.5 * (1 + erf(x * (A)0.70710678118654752440));
        A density = exp((A)-0.5 * x * x) * (A)0.39894228040143267794;
        return {x * below, below + x * density};
    }
    if constexpr (ACTIVATION == RELU) return {x <= 0 ? (A)0 : x, (A)(x > 0)};  // NaN stays NaN
    A u = x, du = 1;
    if constexpr (ACTIVATION == GELU_TANH) {  // (1 + tanh(v)) / 2 = sigmoid(2 v)
        u = x * ((A)1.5957691216057308 + (A)0.07135481627260025 * x * x);
        du = (A)1.5957691216057308 + (A)0.21406444881780074 * x * x;
    }
    A gate = sigmoid(u);
    return {x * gate, gate + x * gate * (1 - gate) * du};
}
