// What the memory of a GPU would have to do for an emulated kernel: a warp's lanes that do the same at the same place of
// the code are one request. Counted where `accesses=FOLDER` in HERD_STAND_IN asks for it, and
// written at the end to a file there that has the number of the process.
#pragma once

#include "emulator.hpp"

namespace emulator::requests {

// A block of so many warps begins.
void begin(u32 warps);
// A thread touches memory.
void note(u32 thread, u64 at, u32 bytes, bool shared, const void* code);
// The lanes of a warp have met: what follows are other requests.
void end(u32 warp);

}  // namespace emulator::requests
