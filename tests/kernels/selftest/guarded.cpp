#include "guarded.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "report.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(data, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(data, bytes)
#endif

namespace halve {

Side guarded_side = Side::kBehind;

namespace {

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// One page that nobody may touch, whole pages with the buffer at one end of them, and another such page.
struct Place {
    size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_t taken, body;

    Place(size_t bytes, size_t alignment)
        : taken(round_up(bytes ? bytes : 1, alignment)), body(round_up(taken, page)) {}
};

}  // namespace

void* map_guarded(size_t bytes, size_t alignment) {
    const Place place(bytes, alignment);
    void* all = mmap(nullptr, place.body + 2 * place.page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* body = static_cast<char*>(all) + place.page;
    if (all == MAP_FAILED || mprotect(body, place.body, PROT_READ | PROT_WRITE)) {
        perror("memory between guard pages");
        exit(2);
    }
    ASAN_POISON_MEMORY_REGION(body, place.body);
    char* data = guarded_side == Side::kBehind ? body + place.body - place.taken : body;
    ASAN_UNPOISON_MEMORY_REGION(data, bytes);
    return data;
}

void unmap_guarded(void* data, size_t bytes, size_t alignment) {
    const Place place(bytes, alignment);
    char* body = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(data) / place.page * place.page);
    ASAN_UNPOISON_MEMORY_REGION(body, place.body);
    munmap(body - place.page, place.body + 2 * place.page);
}

namespace {

// Whether a child of this process lives on after it read a byte.
bool survives_reading(const volatile uint8_t* byte) {
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        close(STDERR_FILENO);
        (void)*byte;
        _exit(0);
    }
    int status = -1;
    return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace

// That a byte too far on the guarded side, and no other, ends a process.
void check_guards(Report& report) {
    for (const size_t bytes : {1, 100, 4096, 5000}) {
        const Buffer<uint8_t> buffer(bytes, 7);
        const uint8_t *first = buffer.data(), *last = first + bytes - 1;
        const uint8_t* beyond = guarded_side == Side::kBehind ? last + 1 : first - 1;
        report.same(format("a buffer of %zu bytes: the first and the last are read, one beyond is not", bytes),
                    std::vector<int>{survives_reading(first), survives_reading(last), survives_reading(beyond)},
                    std::vector<int>{1, 1, 0});
    }
}

}  // namespace halve
