// Looks for races between the threads of an emulated kernel, as compute-sanitizer's racecheck does for shared memory,
// and for global memory, too. Without HERD_RACES all this is nothing.
#pragma once

#include "emulator.hpp"

namespace emulator {

// Of the thread that runs: its number in the block, its kernel, and whether memory is its own or its block's.
int active_thread();
const char* kernel();
bool is_stack(const void* at);
bool is_dynamic_shared(const void* at);

namespace races {

#ifdef HERD_RACES
void begin_launch();
void begin_block(u64 block, int threads);
// All threads of the block, or all lanes of a warp, have met, and see what the others have written.
void order_block();
void order_warp(int warp);
// All lanes of a warp have met; that alone orders nothing.
void meet_warp(int warp);
// A copy that the thread may rely on only when it has waited for it: it may happen at any time until then.
void depart(const void* to, const void* from, const void* code);
void land(const void* to, const void* from);
#else
inline void begin_launch() {}
inline void begin_block(u64, int) {}
inline void order_block() {}
inline void order_warp(int) {}
inline void meet_warp(int) {}
inline void depart(const void*, const void*, const void*) {}
inline void land(const void*, const void*) {}
#endif

}  // namespace races
}  // namespace emulator
