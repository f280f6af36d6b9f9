// Waiting workers spin for a while, since a model's operations follow each other within microseconds, and then sleep.
//
// A job is announced in one atomic word, `gate`: generation << 32 | seats << 16 | workers inside. A worker joins by
// raising `inside` in a word of a generation that is new to it with a seat free; the caller closes the gate by taking
// the seats away, and waits for those inside only. A worker that wakes late finds the gate closed and touches nothing.
//
// A forked child has none of its parent's workers: it starts from a fresh team, grown again at its first job. Nothing
// is torn down at exit, when workers may still be asleep: threads are detached and the team is never destroyed.
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>

namespace halve {
namespace {

constexpr int kSpins = 2000;    // pauses before sleep: some 30 to 90 microseconds
constexpr int64_t kShares = 8;  // for each thread: large at first, so that each reads on in memory, small at last
constexpr uint64_t kSeat = 1u << 16;
constexpr int kMostSeats = 0x7fff;
constexpr int kMostPinned = 1024;  // workers, and cores that they may be pinned to

constexpr uint64_t generation(uint64_t gate) { return gate >> 32; }
constexpr uint64_t seats(uint64_t gate) { return gate >> 16 & 0xffff; }
constexpr uint64_t inside(uint64_t gate) { return gate & 0xffff; }

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Job {
    void (*task)(const void*, int64_t);
    const void* context;
    int64_t blocks;
    int64_t share;  // of what is left, one in so many blocks is taken at once
};

struct Team {
    std::mutex busy;  // held by the caller whose job it is
    std::mutex growing;
    std::atomic<int> workers{0};
    alignas(64) std::atomic<uint64_t> gate{0};
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int> sleepers{0};
    std::mutex sleep;
    std::condition_variable wake;
    pthread_t threads[kMostPinned];  // of the workers, written while `growing` is held, as what follows
    int32_t cores[kMostPinned];
    int num_cores = 0;  // 0: not pinned
    Job job{};          // written only while the gate is closed and nobody is inside

    void work() {
        for (int64_t first = next.load(std::memory_order_relaxed); first < job.blocks;) {
            const int64_t left = job.blocks - first, end = first + (left > job.share ? left / job.share : 1);
            if (!next.compare_exchange_weak(first, end, std::memory_order_relaxed)) continue;
            for (int64_t block = first; block < end; ++block) job.task(job.context, block);
            first = next.load(std::memory_order_relaxed);
        }
    }

    // Join the job at the gate unless it was joined before, is closed or is full; returns the generation seen.
    uint64_t join(uint64_t joined) {
        uint64_t seen = gate.load(std::memory_order_acquire);
        while (generation(seen) != joined && inside(seen) < seats(seen)) {
            if (!gate.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
            work();
            gate.fetch_sub(1, std::memory_order_release);
            break;
        }
        return generation(seen);
    }

    void serve() {
        for (uint64_t joined = 0;;) {
            for (int spin = 0; spin < kSpins && generation(gate.load(std::memory_order_acquire)) == joined; ++spin) {
                pause();
            }
            if (generation(gate.load(std::memory_order_acquire)) == joined) {
                std::unique_lock<std::mutex> lock(sleep);
                sleepers.fetch_add(1);  // before the gate is read again, as the caller reads them in the other order
                wake.wait(lock, [&] { return generation(gate.load()) != joined; });
                sleepers.fetch_sub(1);
            }
            joined = join(joined);
        }
    }

    void lead(const Job& todo, int helpers) {
        job = todo;
        next.store(0, std::memory_order_relaxed);
        gate.store((generation(gate.load()) + 1) << 32 | static_cast<uint64_t>(helpers) * kSeat);
        if (sleepers.load() > 0) {
            {
                std::lock_guard<std::mutex> lock(sleep);
            }  // a worker on its way to sleep has looked, or will hear
            wake.notify_all();
        }
        work();
        gate.fetch_and(~(0xffffull << 16));
        for (int spin = 0; inside(gate.load(std::memory_order_acquire)); ++spin) {
            spin < kSpins ? pause() : static_cast<void>(sched_yield());
        }
    }
};

alignas(Team) unsigned char storage[sizeof(Team)];
Team* team = nullptr;

void start_afresh() { team = new (storage) Team; }

void* serve(void* of) {
    static_cast<Team*>(of)->serve();
    return nullptr;
}

// Whether the worker now runs where it should.
bool pin(int worker) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    if (team->num_cores) {
        CPU_SET(team->cores[worker % team->num_cores], &set);
    } else if (sched_getaffinity(0, sizeof set, &set)) {
        return false;
    }
    return pthread_setaffinity_np(team->threads[worker], sizeof set, &set) == 0;
#else
    (void)worker;
    return false;
#endif
}

bool start_worker() {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 1 << 20);
    sigset_t all, before;  // signals are for the threads of the interpreter
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int worker = team->workers.load();
    pthread_t thread;
    const bool started = pthread_create(&thread, &attributes, serve, team) == 0;
    if (started && worker < kMostPinned) {
        team->threads[worker] = thread;
        if (team->num_cores) pin(worker);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    return started;
}

struct AtLoad {
    AtLoad() {
        start_afresh();
        pthread_atfork(nullptr, nullptr, start_afresh);
    }
} at_load;

}  // namespace

int grow_team(int threads) {
    const int wanted = (threads < kMostSeats ? threads : kMostSeats) - 1;
    if (team->workers.load(std::memory_order_acquire) < wanted) {
        std::lock_guard<std::mutex> lock(team->growing);
        while (team->workers.load() < wanted && start_worker()) team->workers.fetch_add(1);
    }
    return team->workers.load() + 1;
}

int pin_team(const int32_t* cores, int64_t count) {
    if (count < 0 || count > kMostPinned) return 1;
    std::lock_guard<std::mutex> lock(team->growing);
    for (int64_t i = 0; i < count; ++i) team->cores[i] = cores[i];
    team->num_cores = static_cast<int>(count);
    bool all = true;
    const int workers = team->workers.load();
    for (int i = 0; i < workers && i < kMostPinned; ++i) all = pin(i) && all;
    return all ? 0 : 1;
}

void run(void (*task)(const void*, int64_t), const void* context, int64_t blocks, int threads) {
    if (blocks < threads) threads = static_cast<int>(blocks);
    if (threads > 1) {
        const int strength = grow_team(threads);
        std::unique_lock<std::mutex> mine(team->busy, std::try_to_lock);
        if (strength > 1 && mine.owns_lock()) {
            team->lead({task, context, blocks, kShares * threads}, (threads < strength ? threads : strength) - 1);
            return;
        }
    }
    for (int64_t block = 0; block < blocks; ++block) task(context, block);
}

}  // namespace halve
