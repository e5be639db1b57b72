// Threads: torch's own OpenMP workers, found at run time. A second pool would compete
// with their busy waiting for the same cores, and linking another OpenMP library would start one.
#include "common/parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace dino {
namespace {

// The entry point that GNU, LLVM and Intel OpenMP all export; torch loads one of them globally.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Every worker begins with a range of neighboring tasks, the same in every call of as many tasks, so that it finds in
// its core's cache what it wrote there before; then it helps the others.
struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
};

struct Job {
    const std::function<void(int64_t)>& body;
    std::vector<Range>& ranges;
    int (*number)() = nullptr;  // of the calling thread; null: in order of arrival
    std::atomic<int> workers{0};
};

void work(void* data) {
    Job& job = *static_cast<Job*>(data);
    int count = int(job.ranges.size()), mine = job.number ? job.number() : job.workers.fetch_add(1);
    for (int i = 0; i < count; ++i) {
        Range& range = job.ranges[(mine + i) % count];
        for (int64_t task; (task = range.next.fetch_add(1)) < range.end;) job.body(task);
    }
}

// An exception in a worker ends the process.
void work_together(void* data) noexcept { work(data); }

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
    static const auto gomp = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    static const auto number = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
    if (tasks < threads) threads = int(tasks);
    std::vector<Range> ranges(threads);
    for (int i = 0; i < threads; ++i) {
        ranges[i].next = i * tasks / threads;
        ranges[i].end = (i + 1) * tasks / threads;
    }
    Job job{body, ranges, gomp ? number : nullptr};
    if (threads <= 1) {
        work(&job);
    } else if (gomp) {
        gomp(work_together, &job, unsigned(threads), 0);
    } else {
        std::vector<std::thread> helpers;
        for (int i = 1; i < threads; ++i) helpers.emplace_back(work_together, &job);
        work_together(&job);
        for (auto& helper : helpers) helper.join();
    }
}

}  // namespace dino
