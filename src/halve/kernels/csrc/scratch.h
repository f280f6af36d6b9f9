// Memory that one thread works in and keeps from step to step.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace halve {

struct Scratch {
    void* data = nullptr;
    int64_t bytes = 0;

    // Whether there is as much; what was in it is lost where it grows.
    bool holds(int64_t wanted) {
        if (wanted <= bytes) return true;
        free(data);
        bytes = (wanted + 63) / 64 * 64;
        data = aligned_alloc(64, static_cast<size_t>(bytes));
        if (!data) bytes = 0;
        return data;
    }

    ~Scratch() { free(data); }
};

}  // namespace halve
