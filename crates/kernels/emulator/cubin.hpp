// What a CUBIN, as NVRTC makes it, says of its kernels.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace cubin {

struct Kernel {
  // Registers of a thread, and bytes of shared memory that every block has.
  uint32_t registers = 0, shared = 0;
  // Threads of a block for which it was compiled.
  uint32_t threads_max = 1024;
};

// Kernels by name; none if this is no CUBIN.
std::map<std::string, Kernel> kernels(const void* image);

}  // namespace cubin
