// Threads that work on one step together: a barrier that is cheap when all run, and polite when one doesn't.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#define GRU_POSIX 1
#endif

namespace gru {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A number that threads wait for to change: they spin for about as long as a step may take, then offer their core to
// others, then sleep.
class Signal {
   public:
    uint64_t value() const { return value_.load(std::memory_order_acquire); }

    void raise() {
        value_.fetch_add(1);
        if (num_sleeping_.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }  // a sleeper is either before its check or in its sleep
            changed_.notify_all();
        }
    }

    void wait(uint64_t old, int num_spins) {
        for (int i = 0; i < num_spins; ++i) {
            if (value() != old) return;
            pause();
        }
        for (int i = 0; num_spins > 0 && i < kYields; ++i) {
            if (value() != old) return;
            std::this_thread::yield();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        num_sleeping_.fetch_add(1);
        changed_.wait(lock, [&] { return value_.load() != old; });
        num_sleeping_.fetch_sub(1);
    }

    static constexpr int kSpins = 2000;  // some 30 us

   private:
    static constexpr int kYields = 200;
    alignas(64) std::atomic<uint64_t> value_{0};
    std::atomic<int> num_sleeping_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};

// A point that all `size` threads have to reach before any goes on. With one it costs nothing.
class Barrier {
   public:
    void reset(int size) { size_ = size; }
    int size() const { return size_; }

    void wait() {
        if (size_ == 1) return;
        const uint64_t round = passed_.value();
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            passed_.raise();
        } else {
            passed_.wait(round, Signal::kSpins);
        }
    }

   private:
    int size_ = 1;
    alignas(64) std::atomic<int> arrived_{0};
    Signal passed_;
};

// Helpers that sleep until there is something to do, started when they are first needed: a thread doesn't survive a
// fork. After one they are started again.
class Pool {
   public:
    ~Pool() { stop(); }

    // Call work(rank) for ranks 0 .. n - 1 side by side, 0 in this thread, n <= num_threads; n is what work is told.
    // Fewer than asked for if the system has no more threads.
    int prepare(int num_threads) {
        if (num_threads == 1) return 1;
#if GRU_POSIX
        if (crew_ != nullptr && crew_->process != getpid()) crew_ = nullptr;  // its threads exist in the parent only
#endif
        if (crew_ == nullptr) crew_ = new Crew;
        Crew& crew = *crew_;
        Signals blocked;
        try {
            while (int(crew.threads.size()) + 1 < num_threads) {
                const int rank = int(crew.threads.size()) + 1;
                crew.threads.emplace_back(help, std::ref(crew), rank, crew.called.value());
            }
        } catch (const std::system_error&) {
        }
        const int there = int(crew.threads.size()) + 1;
        return there < num_threads ? there : num_threads;
    }

    // num_threads: as `prepare` returned.
    template <typename Work>
    void run(int num_threads, const Work& work) {
        if (num_threads == 1) return work(0);
        Crew& crew = *crew_;
        crew.work = [&work, num_threads](int rank) {
            if (rank < num_threads) work(rank);
        };
        crew.num_busy.store(int(crew.threads.size()), std::memory_order_relaxed);
        const uint64_t round = crew.done.value();
        crew.called.raise();
        work(0);
        crew.done.wait(round, Signal::kSpins);
    }

   private:
    struct Crew {
        std::vector<std::thread> threads;
        std::function<void(int)> work;
        Signal called, done;
        std::atomic<int> num_busy{0};
        std::atomic<bool> ends{false};
#if GRU_POSIX
        const pid_t process = getpid();
#endif
    };

    // While it lives, threads are started that leave signals to others: Python handles them in its main thread.
    struct Signals {
#if GRU_POSIX
        sigset_t before;
        Signals() {
            sigset_t all;
            sigfillset(&all);
            pthread_sigmask(SIG_SETMASK, &all, &before);
        }
        ~Signals() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
#endif
    };

    static void help(Crew& crew, int rank, uint64_t round) {
        for (;; ++round) {
            crew.called.wait(round, 0);
            if (crew.ends.load()) return;
            crew.work(rank);
            if (crew.num_busy.fetch_sub(1) == 1) crew.done.raise();
        }
    }

    void stop() {
        if (crew_ == nullptr) return;
#if GRU_POSIX
        if (crew_->process != getpid()) return;
#endif
        crew_->ends.store(true);
        crew_->called.raise();
        for (std::thread& thread : crew_->threads) thread.join();
        delete crew_;
        crew_ = nullptr;
    }

    Crew* crew_ = nullptr;
};

// Whether threads should share each step of a few rows: they have to meet twice a step, which pays only while each has
// a core to itself. Judged by the time that it took, against that of one thread alone.
class Cooperation {
   public:
    explicit Cooperation(bool always) : always_(always) {}

    bool pays(int64_t num_rows) {
        if (num_rows >= int64_t(alone_.size())) alone_.resize(num_rows + 1);
        if (always_) return true;
        if (alone_[num_rows] == 0) return false;  // not known yet
        return num_refusals_ == 0 || --num_refusals_ == 0;
    }

    void measured(int64_t num_rows, bool together, double step_s) {
        double& alone = alone_[num_rows];
        if (!together) {
            alone = alone == 0 ? step_s : 0.75 * alone + 0.25 * step_s;
        } else if (step_s > alone) {
            num_refusals_ = patience_ = patience_ < kMostRefusals ? 2 * patience_ : kMostRefusals;
        } else if (patience_ > 1) {
            patience_ /= 2;
        }
    }

   private:
    const bool always_;
    static constexpr int kMostRefusals = 256;  // calls; of some 5 ms each
    std::vector<double> alone_;                // by number of rows: seconds a step
    int num_refusals_ = 0, patience_ = 1;
};

}  // namespace gru
