// One team of threads for the process.
#pragma once

#include <cstdint>

namespace halve {

// Make the team at least `threads` strong, the caller included; returns how strong it is. A thread that the system
// refuses is not an error: the others do its work.
int grow_team(int threads);

// Worker i runs on cores[i % count] from now on, later ones too; count 0 lets all run anywhere the process may. The
// caller's own thread stays as it is. Returns 1 where the system refuses or has no such call, else 0.
int pin_team(const int32_t* cores, int64_t count);

// Run task(context, block) for every block in [0, blocks) on the caller and at most `threads` - 1 of the team, and
// return when all are done. Blocks come from one counter, in stretches that shrink towards the end: a thread reads on
// in memory, and one that the system puts aside holds up a small part of the work. While another caller has the team,
// this one works alone.
void run(void (*task)(const void* context, int64_t block), const void* context, int64_t blocks, int threads);

}  // namespace halve
