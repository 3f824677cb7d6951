// Which keys a query sees, by global positions: under context parallelism a rank holds scattered rows.

struct Mask {
    long long back, ahead;  // how far a query sees, in positions
    const int* q_positions;
    const int* k_positions;
    long long limited;  // 0: every query sees every key, and nobody looks at positions

    __device__ bool hides(long long query, long long key) const {
        if (!limited) return false;
        long long distance = (long long)k_positions[key] - q_positions[query];
        return distance < -back || distance > ahead;
    }
};
