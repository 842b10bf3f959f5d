// Runs a planted kernel, or calls the stand-in for CUDA's driver as one must not.
#include "emulator.hpp"

#include <string>

extern "C" {
int herd_emulator_launch(const char*, const u32*, const u32*, u32, void**);
int cuInit(unsigned);
int cuDevicePrimaryCtxRetain(void**, int);
int cuDevicePrimaryCtxRelease_v2(int);
int cuCtxSetCurrent(void*);
int cuMemAlloc_v2(u64*, std::size_t);
int cuMemFree_v2(u64);
int cuMemHostAlloc(void**, std::size_t, unsigned);
int cuStreamCreate(void**, unsigned);
int cuEventCreate(void**, unsigned);
int cuEventRecord(void*, void*);
int cuEventQuery(void*);
int cuMemcpyHtoDAsync_v2(u64, const void*, std::size_t, void*);
int cuMemcpyDtoHAsync_v2(void*, u64, std::size_t, void*);
}

namespace {

constexpr std::size_t kBytes = 1 << 17;

// Says 0 if the call before it went well.
void check(int error) {
  if (error != 0) std::exit(3);
}

void misuse(const std::string& what, u64 memory, void* stream) {
  u8 small[16] = {};
  static u8 large[kBytes] = {};
  if (what == "copy_past_the_end") check(cuMemcpyHtoDAsync_v2(memory + kBytes - 8, small, 16, stream));
  if (what == "large_copy_that_may_wait") check(cuMemcpyHtoDAsync_v2(memory, large, kBytes, stream));
  if (what == "read_that_may_wait") check(cuMemcpyDtoHAsync_v2(small, memory, 16, stream));
  if (what == "memory_that_is_left") check(cuDevicePrimaryCtxRelease_v2(0));
  if (what == "memory_freed_twice") {
    check(cuMemFree_v2(memory));
    check(cuMemFree_v2(memory));
  }
  if (what == "full_queue") {
    for (int i = 0; i < 2000; i++) check(cuMemcpyHtoDAsync_v2(memory, small, 16, stream));
  }
  if (what == "no_context") {
    check(cuCtxSetCurrent(nullptr));
    check(cuMemFree_v2(memory));
  }
  if (what == "bytes_read_before_they_are_there" || what == "bytes_read_when_they_are_there") {
    void *pinned, *event;
    check(cuMemHostAlloc(&pinned, 16, 0));
    check(cuMemcpyHtoDAsync_v2(memory, small, 16, stream));
    check(cuMemcpyDtoHAsync_v2(pinned, memory, 16, stream));
    check(cuEventCreate(&event, 2));
    check(cuEventRecord(event, stream));
    if (what == "bytes_read_when_they_are_there") {
      while (cuEventQuery(event) != 0) {}
    }
    std::exit(std::memcmp(pinned, small, 16) == 0 ? 0 : 5);
  }
}

}  // namespace

int main(int, char** arguments) {
  const std::string what = arguments[1];
  void *context, *stream;
  u64 memory;
  check(cuInit(0));
  check(cuDevicePrimaryCtxRetain(&context, 0));
  check(cuCtxSetCurrent(context));
  check(cuStreamCreate(&stream, 1));
  check(cuMemAlloc_v2(&memory, kBytes));
  if (!emulator::find(what)) {
    misuse(what, memory, stream);
    return 4;
  }
  const u32 grid[3] = {2, 1, 1}, block[3] = {64, 1, 1};
  void* parameters[1] = {&memory};
  return herd_emulator_launch(what.c_str(), grid, block, 4096, parameters);
}
