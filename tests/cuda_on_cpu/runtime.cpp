// Runs the threads of one block as fibers of one host thread: they take turns, and change at barriers only.
//
// A barrier is released when every thread that should come has come. Where the CUDA manual leaves the outcome undefined
// (a lane that has exited is named in a shuffle, a thread of the block never reaches __syncthreads) the launch fails
// with a message. A warp runs as far as it can before the next has its turn, and the order of turns is a parameter: a
// kernel without data races gives the same bits in every order.

#include "device.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum State { READY, AT_WARP, AT_BLOCK, DONE };

struct Copy {
    void* to;
    const void* from;
    bool there;
};

struct Fiber {
    ucontext_t start;
    jmp_buf state;
    bool started;
    State at;
    std::deque<std::vector<Copy>> groups;  // copies in the background: those committed, and the open group last
};

constexpr int MOST_THREADS = 1024;
constexpr unsigned long STACK_BYTES = 256 * 1024;  // untouched pages cost nothing

static Fiber fibers[MOST_THREADS];
static jmp_buf scheduler;
static ucontext_t home;
static int current, threads;
static const Job* job;
static char message[256];
static unsigned long long exchange_slots[MOST_THREADS];

static void leave(State at) {
    fibers[current].at = at;
    if (_setjmp(fibers[current].state) == 0) _longjmp(scheduler, 1);
}

static void fiber_main() {
    for (;;) {
        job->run();
        leave(DONE);
    }
}

static void create(Fiber& fiber) {
    void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) std::abort();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stack;
    fiber.start.uc_stack.ss_size = STACK_BYTES;
    fiber.start.uc_link = &home;
    makecontext(&fiber.start, fiber_main, 0);
    fiber.started = false;
}

static void turn(int thread) {
    current = thread;
    threadIdx.x = thread % blockDim.x;
    threadIdx.y = thread / blockDim.x % blockDim.y;
    threadIdx.z = thread / blockDim.x / blockDim.y;
    Fiber& fiber = fibers[thread];
    if (_setjmp(scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.state, 1);
        fiber.started = true;
        if (fiber.start.uc_stack.ss_sp == nullptr) create(fiber), fiber.started = true;
        setcontext(&fiber.start);
    }
}

void sync_block() { leave(AT_BLOCK); }
void sync_warp() { leave(AT_WARP); }
unsigned long long* exchange() { return exchange_slots + current / 32 * 32; }
int lane() { return current % 32; }

void copy_async(void* to, const void* from, bool there) {
    if ((unsigned long long)to % 16 || (there && (unsigned long long)from % 16)) std::abort();
    fibers[current].groups.back().push_back({to, from, there});
}

void commit_copies() { fibers[current].groups.emplace_back(); }

void await_copies(int groups_left) {
    auto& groups = fibers[current].groups;
    while ((int)groups.size() - 1 > groups_left) {
        for (const Copy& copy : groups.front()) {
            if (copy.there) std::memcpy(copy.to, copy.from, 16);
            else std::memset(copy.to, 0, 16);
        }
        groups.pop_front();
    }
}

alignas(16) static unsigned char dynamic_room[227 * 1024];

void* dynamic_shared() { return dynamic_room; }

static int position(int i, int count, int order) {
    if (order == 1) return count - 1 - i;
    if (order == 2) return (i * 13 + 5) % count;  // a permutation unless 13 divides the count
    return i;
}

// Runs a warp as far as it gets without the others, so that one that misses a barrier is far ahead or behind.
static const char* run_warp(int first, int size, int order) {
    for (;;) {
        for (int i = 0; i < size; i++) {
            int thread = first + position(i, size, size % 13 ? order : 1);
            if (fibers[thread].at == READY) turn(thread);
        }
        int waiting = 0;
        for (int i = 0; i < size; i++) waiting += fibers[first + i].at == AT_WARP;
        if (waiting == 0) return nullptr;
        if (waiting < size) return "threads wait at a barrier that others have passed by or exited before";
        if (size < 32) return "a warp of fewer than 32 threads exchanges values with all 32 lanes";
        for (int i = 0; i < size; i++) fibers[first + i].at = READY;
    }
}

static bool run_block(int order) {
    for (int i = 0; i < threads; i++) {
        fibers[i].at = READY;
        fibers[i].groups.assign(1, {});
    }
    int warps = (threads + 31) / 32;
    for (;;) {
        const char* trouble = nullptr;
        for (int i = 0; i < warps && !trouble; i++) {
            int first = 32 * position(i, warps, warps % 13 ? order : 1);
            trouble = run_warp(first, threads - first < 32 ? threads - first : 32, order);
        }
        int done = 0;
        for (int i = 0; i < threads; i++) done += fibers[i].at == DONE;
        if (!trouble && done == threads) return true;
        if (!trouble && done > 0) trouble = "threads wait at a barrier that others have passed by or exited before";
        if (trouble) {
            std::snprintf(message, sizeof message, "block (%u, %u, %u): %s", blockIdx.x, blockIdx.y, blockIdx.z, trouble);
            for (int i = 0; i < threads; i++) create(fibers[i]);  // their stacks are lost in the middle of a kernel
            return false;
        }
        for (int i = 0; i < threads; i++) fibers[i].at = READY;
    }
}

const char* launch(const Job& what, const unsigned* grid, const unsigned* block, unsigned shared_bytes, int order) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    threads = block[0] * block[1] * block[2];
    if (threads < 1 || threads > MOST_THREADS) return "a block has 1 to 1024 threads";
    if (grid[1] > 65535 || grid[2] > 65535) return "a grid has at most 65535 blocks along y and z";
    if (shared_bytes > sizeof dynamic_room) return "a block has at most 227 KiB of shared memory";
    if (shared_bytes) std::memset(dynamic_room, 0x7b, sizeof dynamic_room);
    job = &what;
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                bool reverse = order != 0;
                blockIdx = {reverse ? grid[0] - 1 - x : x, reverse ? grid[1] - 1 - y : y, reverse ? grid[2] - 1 - z : z};
                if (!run_block(order)) return message;
            }
    for (unsigned long i = shared_bytes; shared_bytes && i < sizeof dynamic_room; i++)
        if (dynamic_room[i] != 0x7b) return "a block writes beyond the shared memory that it was given";
    return nullptr;
}

}  // namespace emulation
