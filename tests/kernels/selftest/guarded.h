// Memory for what kernels read and write, against pages that nobody may touch, so that a byte too far ends the program.
// A buffer ends where such a page begins or, where `guarded_side` says so, begins where one ends: at its other end
// there is room up to a whole page, which only the address sanitizer knows to be forbidden.
#pragma once

#include <stddef.h>

#include <vector>

namespace halve {

enum class Side { kBehind, kBefore };
extern Side guarded_side;

void* map_guarded(size_t bytes, size_t alignment);
void unmap_guarded(void* data, size_t bytes, size_t alignment);

template <class T, size_t kAlignment>
struct Guarded {
    using value_type = T;
    template <class U>
    struct rebind {
        using other = Guarded<U, kAlignment>;
    };

    T* allocate(size_t n) { return static_cast<T*>(map_guarded(n * sizeof(T), kAlignment)); }
    void deallocate(T* data, size_t n) { unmap_guarded(data, n * sizeof(T), kAlignment); }
    bool operator==(const Guarded&) const { return true; }
};

// What grows leaves room behind it: `shrink_to_fit` before a kernel sees it.
template <class T, size_t kAlignment = alignof(T)>
using Buffer = std::vector<T, Guarded<T, kAlignment>>;

}  // namespace halve
