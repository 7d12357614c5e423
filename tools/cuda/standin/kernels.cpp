// Runs launches of the kernels that ptx.py translated: blocks are spread over the machine's threads; the threads of a
// block are fibers where they exchange something (barriers, shuffles, matrix fragments), and turns of a loop elsewhere.
//
// A fiber runs until it meets an exchange and goes on when all threads concerned have met it; who comes last does the
// exchange's work for all. Threads that wait at different exchanges end the launch with an error, and so do threads that
// have ended before a barrier of the others. Shared memory starts as NaN.
#include "kernels.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

// Saves where the caller is, and goes on where `to` was saved. The first time, a stack holds `fiber_enter` and its thread.
extern "C" void fiber_switch(void** from, void* to);
extern "C" void fiber_enter();
extern "C" void fiber_main(void* thread);
asm(R"(
.text
.globl fiber_switch
.hidden fiber_switch
.type fiber_switch, @function
fiber_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.globl fiber_enter
.hidden fiber_enter
.type fiber_enter, @function
fiber_enter:
    movq %rbx, %rdi
    call fiber_main
    ud2
)");

namespace standin {

constexpr unsigned MAX_THREADS = 1024, WARP = 32;
// A little more than a power of two, so that the threads' variables do not share the lines of a cache.
constexpr size_t STACK = (256 << 10) + 576;
constexpr uint32_t ALL = 0xffffffff;

// What a lane brings to an exchange of its warp.
struct Exchange {
    enum Kind { BARRIER, SHUFFLE, VOTE, MMA, LDMATRIX } kind;
    uint32_t mask;
    int line;
    bool aligned;  // all lanes must take part, in the same instruction
};

struct Warp {
    uint32_t live, ready, waiting, at_barrier;  // lanes
    Exchange* exchanges[WARP];
    Thread* first;
};

struct Copy {
    unsigned char* to;
    unsigned size;
    unsigned char data[16];
};
// Asynchronous copies of a thread, group after group, and where the groups end.
struct Copies {
    std::vector<Copy> all;
    std::vector<size_t> ends;
    size_t arrived = 0, waited = 0;  // copies, groups
};

struct Launch {
    const Kernel* kernel;
    void* const* parameters;
    const unsigned *grid, *block;
    unsigned dynamic_shared, threads;
    uint64_t blocks, chunk;
    std::atomic<uint64_t> next{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::string error;
};

static bool (*memory_valid)(const void*, size_t) = nullptr;
static int thread_order = 1;

// A machine thread and the block that it runs.
struct Worker {
    Launch* launch = nullptr;
    Thread threads[MAX_THREADS];
    Copies copies[MAX_THREADS];
    Warp warps[MAX_THREADS / WARP];
    void* scheduler = nullptr;
    unsigned char* stacks;
    std::vector<unsigned char> shared_memory;
    std::mt19937 random{7};

    Worker() {
        stacks = (unsigned char*)mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) {
            perror("the stacks of a block");
            abort();
        }
    }
    void start(unsigned thread);
    void go(Thread& t) { fiber_switch(&scheduler, t.stack); }
    void set_block(uint64_t index);
    bool run_block();
    bool run_plain(uint64_t from, uint64_t to);
    void work();
};
static thread_local Worker* worker = nullptr;

// --- errors

static std::string text(const char* format, ...) {
    char buffer[600];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}

static void record(Launch& launch, const std::string& error) {
    std::lock_guard<std::mutex> lock(launch.mutex);
    if (launch.error.empty()) launch.error = error;
    launch.failed = true;
}

static void report(Thread& t, int line, const std::string& what) {
    const Kernel& kernel = *worker->launch->kernel;
    record(*worker->launch, text("%s: %s (block %u %u %u, thread %u %u %u, %s:%d)", kernel.info.name, what.c_str(), t.ctaid[0],
                                 t.ctaid[1], t.ctaid[2], t.tid[0], t.tid[1], t.tid[2], kernel.file, line));
}
// Goes back to the worker; the fiber is left where it is.
[[noreturn]] static void leave() {
    void* nowhere;
    fiber_switch(&nowhere, worker->scheduler);
    abort();
}
[[noreturn]] static void end(Thread& t, int line, const std::string& what) {
    report(t, line, what);
    leave();
}
void fail(Thread& t, int line, const char* what) { end(t, line, what); }
void fail_assert(Thread& t, int line, const char* what, const char* file, unsigned at) {
    end(t, line, text("assertion `%s` failed at %s:%u", what, file, at));
}
void bad_shared(Thread& t, uint64_t address, unsigned size, int line) {
    end(t, line, text("%s access to shared memory: %u bytes at %lld of %u", address & (size - 1) ? "a misaligned" : "an out of bounds",
                      size, (long long)address, t.shared_size));
}
// Whether an address is one of the kernels' own variables (.global and .const of their files).
static bool in_this_library(const void* address) {
    Dl_info here, there;
    return dladdr((const void*)&kernel_find, &here) && dladdr(address, &there) && here.dli_fbase == there.dli_fbase;
}
void check_global(Thread& t, uint64_t address, unsigned size, int line) {
    if (address & (size - 1)) end(t, line, text("a misaligned access: %u bytes at 0x%llx", size, (unsigned long long)address));
    if (memory_valid && !memory_valid((const void*)address, size) && !in_this_library((const void*)address))
        end(t, line, text("an access to memory that is not there: %u bytes at 0x%llx", size, (unsigned long long)address));
}
void check_generic(Thread& t, uint64_t address, unsigned size, int line) {
    const uint64_t shared = (uint64_t)t.shared, stacks = (uint64_t)worker->stacks;
    const bool inside = (address >= shared && address + size <= shared + t.shared_size) ||
                        (address >= stacks && address < stacks + MAX_THREADS * STACK);
    if (!inside || address & (size - 1)) check_global(t, address, size, line);
}

// --- fibers

void Worker::start(unsigned index) {
    void** top = (void**)(stacks + (index + 1) * STACK) - 2;
    *--top = (void*)fiber_enter;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    top[4] = &threads[index];  // rbx
    threads[index].stack = top;
}

// Lets another fiber run; comes back when this one is ready and its turn has come.
static void pause(Thread& t) {
    Warp& warp = *t.warp;
    if (warp.ready && thread_order != 2) {
        const unsigned lane = thread_order == 0 ? __builtin_ctz(warp.ready) : 31 - __builtin_clz(warp.ready);
        fiber_switch(&t.stack, warp.first[lane].stack);
    } else {
        fiber_switch(&t.stack, worker->scheduler);
    }
}

static void run_plain_blocks();

}  // namespace standin

extern "C" void fiber_main(void* thread) {
    using namespace standin;
    Thread& t = *(Thread*)thread;
    const Launch& launch = *worker->launch;
    if (!launch.kernel->exchanges) {
        run_plain_blocks();
        leave();
    }
    launch.kernel->body(t, launch.parameters);
    Copies& copies = *t.copies;
    if (copies.waited < copies.ends.size() || copies.arrived < copies.all.size())
        fail(t, 0, "an asynchronous copy was never waited for");
    t.warp->live &= ~(1u << t.lane);
    t.warp->ready &= ~(1u << t.lane);
    pause(t);
    abort();
}

namespace standin {

// --- exchanges of a warp

// `kind` and what follows of a lane's exchange.
struct WarpBarrier : Exchange {};
struct ShuffleExchange : Exchange {
    Shuffle how;
    uint32_t a, b, c;
    Shuffled result;
};
struct VoteExchange : Exchange {
    Vote how;
    bool a;
    uint32_t result;
};
struct MmaExchange : Exchange {
    bool bf16;
    float (&d)[4];
    const uint32_t (&a)[4], (&b)[2];
    const float (&c)[4];
};
struct LdmatrixExchange : Exchange {
    unsigned count;
    bool transposed;
    uint32_t* r;
    uint64_t address;
};

static void do_shuffle(Warp& warp, uint32_t mask) {
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        auto& mine = *(ShuffleExchange*)warp.exchanges[lane];
        const int b = mine.b & 31, clamp = mine.c & 31, segment = mine.c >> 8 & 31;
        const int first = lane & segment, last = first | (clamp & ~segment);
        int from;
        bool in_range;
        switch (mine.how) {
            case SHUFFLE_UP: from = lane - b, in_range = from >= last; break;
            case SHUFFLE_DOWN: from = lane + b, in_range = from <= last; break;
            case SHUFFLE_BFLY: from = lane ^ b, in_range = from <= last; break;
            default: from = first | (b & ~segment), in_range = from <= last; break;
        }
        if (!in_range) from = lane;
        // what a lane that does not take part shows is not specified
        const bool there = mask >> from & 1;
        mine.result = {there ? ((ShuffleExchange*)warp.exchanges[from])->a : ALL, in_range};
    }
}

static void do_vote(Warp& warp, uint32_t mask) {
    uint32_t yes = 0;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        yes |= (uint32_t)((VoteExchange*)warp.exchanges[lane])->a << lane;
    }
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        auto& mine = *(VoteExchange*)warp.exchanges[__builtin_ctz(rest)];
        const uint32_t results[] = {yes == mask, yes != 0, yes == mask || yes == 0, yes};
        mine.result = results[mine.how];
    }
}

// By the tables of the PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type". The sum over k is one of f32
// in the order of k, to which c is added.
static void do_mma(Warp& warp) {
    typedef float Row __attribute__((vector_size(32)));
    float a[16][16], d[16][8];
    alignas(32) float b[16][8];
    const bool bf16 = ((MmaExchange*)warp.exchanges[0])->bf16;
    auto low = [=](uint32_t pair) { return bf16 ? b2f((uint16_t)pair) : h2f((uint16_t)pair); };
    auto high = [=](uint32_t pair) { return bf16 ? b2f((uint16_t)(pair >> 16)) : h2f((uint16_t)(pair >> 16)); };
    for (unsigned lane = 0; lane < WARP; lane++) {
        const auto& mine = *(MmaExchange*)warp.exchanges[lane];
        const unsigned group = lane / 4, pair = 2 * (lane % 4);
        for (unsigned i = 0; i < 4; i++) {
            float* to = &a[group + i % 2 * 8][pair + i / 2 * 8];
            to[0] = low(mine.a[i]), to[1] = high(mine.a[i]);
        }
        for (unsigned i = 0; i < 2; i++) {
            b[pair + 8 * i][group] = low(mine.b[i]);
            b[pair + 8 * i + 1][group] = high(mine.b[i]);
        }
    }
    for (unsigned i = 0; i < 16; i++) {
        Row sum = {};
        for (unsigned k = 0; k < 16; k++) sum += a[i][k] * *(const Row*)b[k];
        memcpy(d[i], &sum, sizeof sum);
    }
    for (unsigned lane = 0; lane < WARP; lane++) {
        auto& mine = *(MmaExchange*)warp.exchanges[lane];
        for (unsigned e = 0; e < 4; e++) mine.d[e] = mine.c[e] + d[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
    }
}

// Lane 8 m + i gives the address of row i of matrix m.
static void do_ldmatrix(Warp& warp) {
    for (unsigned lane = 0; lane < WARP; lane++) {
        auto& mine = *(LdmatrixExchange*)warp.exchanges[lane];
        for (unsigned matrix = 0; matrix < mine.count; matrix++)
            for (unsigned half = 0; half < 2; half++) {
                const unsigned row = mine.transposed ? 2 * (lane % 4) + half : lane / 4;
                const unsigned column = mine.transposed ? lane / 4 : 2 * (lane % 4) + half;
                const uint64_t address = ((LdmatrixExchange*)warp.exchanges[8 * matrix + row])->address;
                memcpy((char*)&mine.r[matrix] + 2 * half, warp.first->shared + address + 2 * column, 2);
            }
    }
}

// Does the exchange that lane `lane` waits for, if all its lanes have come. Errors are reported: the launch has failed then.
static bool complete(Warp& warp, unsigned lane) {
    const Exchange& mine = *warp.exchanges[lane];
    const uint32_t lanes = mine.mask & warp.live;
    if ((warp.waiting & lanes) != lanes) return false;
    Thread& t = warp.first[lane];
    if (mine.aligned && lanes != mine.mask) {
        report(t, mine.line, "lanes have ended before an instruction of the whole warp");
        return false;
    }
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
        const Exchange& other = *warp.exchanges[__builtin_ctz(rest)];
        if (other.kind != mine.kind || other.mask != mine.mask || other.line != mine.line) {
            report(t, mine.line, text("lanes of a warp wait at different instructions, one of them at line %d", other.line));
            return false;
        }
    }
    switch (mine.kind) {
        case Exchange::BARRIER: break;
        case Exchange::SHUFFLE: do_shuffle(warp, lanes); break;
        case Exchange::VOTE: do_vote(warp, lanes); break;
        case Exchange::MMA: do_mma(warp); break;
        case Exchange::LDMATRIX: do_ldmatrix(warp); break;
    }
    warp.waiting &= ~lanes;
    warp.ready |= lanes;
    return true;
}

static void exchange(Thread& t, Exchange& mine) {
    Warp& warp = *t.warp;
    if (!(mine.mask >> t.lane & 1)) end(t, mine.line, "a thread that is not in the mask of its own instruction");
    warp.exchanges[t.lane] = &mine;
    warp.waiting |= 1u << t.lane;
    warp.ready &= ~(1u << t.lane);
    const bool done = complete(warp, t.lane);
    if (worker->launch->failed) leave();
    if (!done) pause(t);
}

void barrier(Thread& t, int line) {
    t.line = line;
    t.warp->at_barrier |= 1u << t.lane;
    t.warp->ready &= ~(1u << t.lane);
    pause(t);
}
void warp_barrier(Thread& t, uint32_t mask, int line) {
    WarpBarrier mine{{Exchange::BARRIER, mask, line, false}};
    exchange(t, mine);
}
Shuffled shuffle(Thread& t, Shuffle how, uint32_t a, uint32_t b, uint32_t c, uint32_t mask, int line) {
    ShuffleExchange mine{{Exchange::SHUFFLE, mask, line, false}, how, a, b, c, {}};
    exchange(t, mine);
    return mine.result;
}
uint32_t vote(Thread& t, Vote how, bool a, uint32_t mask, int line) {
    VoteExchange mine{{Exchange::VOTE, mask, line, false}, how, a, 0};
    exchange(t, mine);
    return mine.result;
}
void mma(Thread& t, bool bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], int line) {
    MmaExchange mine{{Exchange::MMA, ALL, line, true}, bf16, d, a, b, c};
    exchange(t, mine);
}
void ldmatrix(Thread& t, unsigned count, bool transposed, uint32_t* r, uint64_t address, int line) {
    if (t.lane < 8 * count) shared_at<unsigned char>(t, address, 16, line);
    LdmatrixExchange mine{{Exchange::LDMATRIX, ALL, line, true}, count, transposed, r, address};
    exchange(t, mine);
}

// --- asynchronous copies, which read their source at once

void copy_async(Thread& t, uint64_t to, uint64_t from, unsigned size, unsigned source_size, int line) {
    Copy copy = {shared_at<unsigned char>(t, to, size, line), size, {}};
    if (from & (size - 1)) check_global(t, from, size, line);
    if (source_size > size) end(t, line, "cp.async from more bytes than it writes");
    if (source_size && t.checks) check_global(t, from, size, line);
    memcpy(copy.data, (const void*)from, source_size);
    if (thread_order == 0) memcpy(copy.to, copy.data, size);
    t.copies->all.push_back(copy);
}
void copy_commit(Thread& t) { t.copies->ends.push_back(t.copies->all.size()); }
void copy_wait(Thread& t, unsigned groups) {
    Copies& c = *t.copies;
    for (; c.ends.size() - c.waited > groups; c.waited++)
        for (; c.arrived < c.ends[c.waited]; c.arrived++)
            if (thread_order != 0) memcpy(c.all[c.arrived].to, c.all[c.arrived].data, c.all[c.arrived].size);
    if (c.waited == c.ends.size() && c.arrived == c.all.size()) {
        c.all.clear(), c.ends.clear();
        c.arrived = c.waited = 0;
    }
}

// --- blocks

void Worker::set_block(uint64_t index) {
    const unsigned *grid = launch->grid, *block = launch->block;
    const unsigned static_shared = launch->kernel->info.static_shared;
    const unsigned place[3] = {(unsigned)(index % grid[0]), (unsigned)(index / grid[0] % grid[1]),
                               (unsigned)(index / grid[0] / grid[1])};
    const size_t size = static_shared + launch->dynamic_shared;
    if (shared_memory.size() < size + 1024) shared_memory.resize(size + 1024);
    unsigned char* shared = shared_memory.data() + (-(uintptr_t)shared_memory.data() & 255);
    memset(shared, 0xff, size);
    for (unsigned i = 0; i < (launch->kernel->exchanges ? launch->threads : 1); i++) {
        Thread& t = threads[i];
        t.shared = shared;
        t.shared_size = (uint32_t)size;
        t.dynamic_size = launch->dynamic_shared;
        t.checks = memory_valid != nullptr;
        t.index = i;
        t.lane = i % WARP;
        t.tid[0] = i % block[0], t.tid[1] = i / block[0] % block[1], t.tid[2] = i / block[0] / block[1];
        for (int k = 0; k < 3; k++) t.ntid[k] = block[k], t.nctaid[k] = grid[k], t.ctaid[k] = place[k];
        t.warp = &warps[i / WARP];
        t.copies = &copies[i];
    }
}

// The one fiber of a kernel without exchanges runs all threads of many blocks.
static thread_local uint64_t plain_from, plain_to;
static void run_plain_blocks() {
    Worker& w = *worker;
    const Launch& launch = *w.launch;
    for (uint64_t block = plain_from; block < plain_to; block++) {
        w.set_block(block);
        Thread& t = w.threads[0];
        for (t.tid[2] = 0; t.tid[2] < launch.block[2]; t.tid[2]++)
            for (t.tid[1] = 0; t.tid[1] < launch.block[1]; t.tid[1]++)
                for (t.tid[0] = 0; t.tid[0] < launch.block[0]; t.tid[0]++) {
                    t.lane = t.index % WARP;
                    launch.kernel->body(t, launch.parameters);
                    t.index++;
                }
    }
}
bool Worker::run_plain(uint64_t from, uint64_t to) {
    plain_from = from, plain_to = to;
    start(0);
    go(threads[0]);
    return !launch->failed;
}

bool Worker::run_block() {
    const unsigned count = launch->threads, warp_count = (count + WARP - 1) / WARP;
    for (unsigned i = 0; i < count; i++) {
        start(i);
        copies[i].all.clear(), copies[i].ends.clear();
        copies[i].arrived = copies[i].waited = 0;
    }
    for (unsigned i = 0; i < warp_count; i++) {
        const unsigned lanes = std::min(WARP, count - WARP * i);
        warps[i].live = warps[i].ready = lanes == WARP ? ALL : (1u << lanes) - 1;
        warps[i].waiting = warps[i].at_barrier = 0;
        warps[i].first = &threads[WARP * i];
    }
    std::vector<unsigned> ready;
    for (;;) {
        if (launch->failed) return false;
        // whose turn it is
        ready.clear();
        for (unsigned i = 0; i < warp_count; i++)
            if (warps[i].ready) ready.push_back(i);
        if (!ready.empty()) {
            if (thread_order == 2) {
                Warp& warp = warps[ready[random() % ready.size()]];
                uint32_t lanes = warp.ready;
                for (unsigned skip = random() % __builtin_popcount(lanes); skip > 0; skip--) lanes &= lanes - 1;
                go(warp.first[__builtin_ctz(lanes)]);
            } else if (thread_order == 0) {
                Warp& warp = warps[ready.front()];
                go(warp.first[__builtin_ctz(warp.ready)]);
            } else {
                Warp& warp = warps[ready.back()];
                go(warp.first[31 - __builtin_clz(warp.ready)]);
            }
            continue;
        }
        // exchanges whose last lanes have ended, then the block's barrier
        unsigned live = 0, waiting = 0, at_barrier = 0;
        Thread* someone = nullptr;
        bool progress = false;
        for (unsigned i = 0; i < warp_count; i++) {
            Warp& warp = warps[i];
            live += __builtin_popcount(warp.live);
            waiting += __builtin_popcount(warp.waiting);
            at_barrier += __builtin_popcount(warp.at_barrier);
            if (warp.live) someone = &warp.first[__builtin_ctz(warp.live)];
            if (warp.waiting) someone = &warp.first[__builtin_ctz(warp.waiting)];
            for (uint32_t rest = warp.waiting; rest && !progress; rest &= rest - 1) progress = complete(warp, __builtin_ctz(rest));
        }
        if (progress || launch->failed) continue;
        if (live == 0) return true;
        auto bad = [&](const char* what) {
            record(*launch, text("%s: %s (block %u %u %u, thread %u, near %s:%d)", launch->kernel->info.name, what,
                                 someone->ctaid[0], someone->ctaid[1], someone->ctaid[2], someone->index, launch->kernel->file,
                                 someone->warp->waiting >> someone->lane & 1 ? someone->warp->exchanges[someone->lane]->line
                                                                             : someone->line));
        };
        if (waiting > 0) return bad("threads wait for each other at different barriers"), false;
        if (at_barrier < count) return bad("some threads have ended before a barrier of the others"), false;
        for (unsigned i = 0; i < count; i++)
            if (threads[i].line != warps[i / WARP].first->line) {
                someone = &threads[i];
                return bad("threads of a warp wait at different barriers"), false;
            }
        for (unsigned i = 0; i < warp_count; i++) warps[i].ready = warps[i].at_barrier, warps[i].at_barrier = 0;
    }
}

void Worker::work() {
    worker = this;
    for (;;) {
        const uint64_t from = launch->next.fetch_add(launch->chunk);
        if (from >= launch->blocks || launch->failed) return;
        const uint64_t to = std::min(from + launch->chunk, launch->blocks);
        if (!launch->kernel->exchanges) {
            if (!run_plain(from, to)) return;
            continue;
        }
        for (uint64_t block = from; block < to; block++) {
            set_block(block);
            if (!run_block()) return;
        }
    }
}

// --- launches

// Helps with one launch at a time. Lives as long as the program.
class Pool {
    std::mutex mutex;
    std::condition_variable wake, done;
    std::vector<Worker*> workers;
    Launch* launch = nullptr;
    uint64_t round = 0;
    unsigned busy = 0;

    void help(unsigned index) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return round != seen; });
            seen = round;
            workers[index]->launch = launch;
            lock.unlock();
            workers[index]->work();
            lock.lock();
            if (--busy == 0) done.notify_one();
        }
    }

public:
    Pool() {
        const char* wanted = getenv("STANDIN_THREADS");
        const unsigned count = std::max(1u, wanted ? (unsigned)atoi(wanted) : std::thread::hardware_concurrency());
        for (unsigned i = 0; i < count; i++) workers.push_back(new Worker);
        for (unsigned i = 1; i < count; i++) std::thread([this, i] { help(i); }).detach();
    }
    unsigned size() const { return (unsigned)workers.size(); }
    // The caller is the first worker; the others help where there is something to share.
    void run(Launch& all) {
        const bool share = workers.size() > 1 && all.blocks * all.threads > 2048 && all.blocks > 1;
        if (share) {
            std::lock_guard<std::mutex> lock(mutex);
            launch = &all;
            busy = (unsigned)workers.size() - 1;
            round++;
            wake.notify_all();
        }
        workers[0]->launch = &all;
        workers[0]->work();
        if (share) {
            std::unique_lock<std::mutex> lock(mutex);
            done.wait(lock, [&] { return busy == 0; });
        }
    }
};

typedef std::unordered_map<std::string, const Kernel*> Names;
static Names& names() {
    static Names* all = new Names;
    return *all;
}
Table::Table(const Kernel* kernels, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (!names().emplace(kernels[i].info.name, &kernels[i]).second) {
            fprintf(stderr, "two kernels are called %s\n", kernels[i].info.name);
            abort();
        }
}

}  // namespace standin

using namespace standin;

const KernelInfo* kernel_find(const char* name) {
    const auto found = names().find(name);
    return found == names().end() ? nullptr : &found->second->info;
}

const char* kernel_run(const KernelInfo* info, void* const* parameters, const unsigned grid[3], const unsigned block[3],
                       unsigned dynamic_shared) {
    static std::mutex one_at_a_time;
    static std::string error;
    std::lock_guard<std::mutex> lock(one_at_a_time);
    static Pool* pool = new Pool;
    Launch launch;
    launch.kernel = (const Kernel*)info;
    launch.parameters = parameters;
    launch.grid = grid, launch.block = block;
    launch.dynamic_shared = dynamic_shared;
    const uint64_t threads = (uint64_t)block[0] * block[1] * block[2];
    error.clear();
    if (threads == 0 || threads > launch.kernel->max_threads)
        error = text("%s: a block of %llu threads, at most %u are possible", info->name, (unsigned long long)threads,
                     launch.kernel->max_threads);
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535)
        error = text("%s: a grid of %u x %u x %u blocks is not possible", info->name, grid[0], grid[1], grid[2]);
    if (!error.empty()) return error.c_str();
    launch.threads = (unsigned)threads;
    launch.blocks = (uint64_t)grid[0] * grid[1] * grid[2];
    launch.chunk = std::max<uint64_t>(1, std::min<uint64_t>(launch.blocks / (8 * pool->size()), 4096));
    pool->run(launch);
    error = launch.error;
    return error.empty() ? nullptr : error.c_str();
}

void kernel_memory(bool (*valid)(const void*, size_t)) { memory_valid = valid; }
void kernel_order(int order) { thread_order = order; }
