// A few threads that live as long as the process and share numbered tasks.
#pragma once

#include <cstdint>
#include <functional>

namespace shallowfusion {

// Runs task(0) .. task(count - 1) on the caller and up to threads - 1 helpers, in any order; returns when all are done.
// The first exception of a task is thrown again here. Where torch's OpenMP runtime is loaded and has that many threads,
// they are the helpers. While another caller uses the helpers, the caller works alone.
// A forked child starts its own helpers when it first needs them.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

// How many of `count` equal pieces one task takes, so that all threads have as much to do: at most about `most`.
int64_t fair_share(int64_t count, int64_t most, int threads);

int hardware_threads();

}  // namespace shallowfusion
