// Every load and store of a kernel comes by here: the compiler is told to look for races (-fsanitize=thread), but its own
// library, which knows nothing of blocks and warps, is not linked.
//
// Two threads may touch the same byte, one of them writing, only if something is between: the end of the kernel; for
// threads of a block a barrier, of a warp also __syncwarp. Shuffles and votes order nothing. Atomics race with none of
// their own kind.
#include "races.hpp"

#include "requests.hpp"

#include <memory>
#include <unordered_map>

#include <dlfcn.h>
#include <link.h>

namespace emulator {

namespace {

constexpr std::size_t kPage = 4096;
constexpr u32 kNobody = 0xffffffff, kMany = 0xfffffffe;
constexpr u32 kWarp = 32;

// Who has touched a byte last, and when: how many barriers of the block, and of the warp, came before.
struct Touch {
  u32 launch = 0;
  // Many, if several have read it since.
  u32 block = kNobody, warp = kNobody, thread = kNobody;
  u32 barriers = 0, of_warp = 0;
  bool is_atomic = false;
};

struct Byte {
  Touch written, read;
};

struct Page {
  Byte bytes[kPage];
};

std::unordered_map<u64, std::unique_ptr<Page>> pages;
u64 last_number = ~u64(0);
Page* last_page;

u32 launches, block, barriers;
std::vector<u32> of_warps;
// Where the static shared memory of all kernels lies.
u64 data_begin, data_end;

int find_data(dl_phdr_info* info, std::size_t, void*) {
  const u64 here = reinterpret_cast<u64>(&current);
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& segment = info->dlpi_phdr[i];
    const u64 begin = info->dlpi_addr + segment.p_vaddr, end = begin + segment.p_memsz;
    if (segment.p_type == PT_LOAD && (segment.p_flags & PF_W) && begin <= here && here < end) {
      data_begin = begin;
      data_end = end;
      return 1;
    }
  }
  return 0;
}

bool is_shared(u64 at) {
  return is_dynamic_shared(reinterpret_cast<void*>(at)) || (data_begin <= at && at < data_end);
}

Byte& byte_at(u64 at) {
  const u64 number = at / kPage;
  if (number != last_number) {
    auto& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    last_number = number;
    last_page = page.get();
  }
  return last_page->bytes[at % kPage];
}

// Whether what one thread did comes before what the running one does.
bool is_before(const Touch& touch, const Touch& now, bool shared) {
  if (touch.launch != now.launch) return true;
  // Each block has shared memory of its own.
  if (touch.block != now.block) return shared;
  if (touch.thread == now.thread || touch.barriers < now.barriers) return true;
  return touch.warp == now.warp && touch.of_warp < now.of_warp;
}

[[noreturn]] void race(const char* what, const Touch& first, const Touch& now, u64 at, const void* code, bool shared) {
  Dl_info info{};
  dladdr(code, &info);
  std::fprintf(stderr,
               "race in kernel %s, %s memory at %#llx: thread %u of block %u %s what thread %d of block %u touched after "
               "%u barriers of %u; see addr2line -e %s %#llx\n",
               kernel(), shared ? "shared" : "global", at, now.thread, now.block, what, int(first.thread), first.block,
               first.barriers, now.barriers, info.dli_fname ? info.dli_fname : "?",
               u64(code) - reinterpret_cast<u64>(info.dli_fbase));
  std::abort();
}

[[noreturn]] void misplaced(u64 at, std::size_t bytes, const void* code) {
  Dl_info info{};
  dladdr(code, &info);
  std::fprintf(stderr, "kernel %s touches %zu bytes at %#llx, which a GPU refuses; see addr2line -e %s %#llx\n", kernel(), bytes,
               at, info.dli_fname ? info.dli_fname : "?", u64(code) - reinterpret_cast<u64>(info.dli_fbase));
  std::abort();
}

void look(Access access, u64 at, std::size_t bytes, const void* code) {
  // What notes the kernels is compiled with them, and runs before any.
  if (launches == 0 || is_stack(reinterpret_cast<void*>(at))) return;
  const u64 self = reinterpret_cast<u64>(&current);
  if (self <= at && at < self + sizeof current) return;
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && at % bytes != 0) misplaced(at, bytes, code);
  const bool shared = is_shared(at), is_atomic = access == Access::Atomic;
  const u32 thread = u32(active_thread());
  requests::note(thread, at, u32(bytes), shared, code);
  const u32 warp = thread / kWarp;
  const Touch now{launches, block, warp, thread, barriers, of_warps[warp], is_atomic};
  for (u64 i = at; i < at + bytes; i++) {
    Byte& byte = byte_at(i);
    Touch& written = byte.written;
    Touch& read = byte.read;
    const bool both_atomic = is_atomic && written.is_atomic;
    if (!both_atomic && !is_before(written, now, shared)) {
      race(access == Access::Write ? "overwrites" : "reads", written, now, i, code, shared);
    }
    if (access == Access::Constant && written.launch == now.launch && !shared) {
      race("takes for constant", written, now, i, code, shared);
    }
    if (access == Access::Write || is_atomic) {
      if (!is_before(read, now, shared)) race("overwrites", read, now, i, code, shared);
      written = now;
      if (!is_atomic) read = {};
      continue;
    }
    if (read.launch != now.launch || (shared && read.block != now.block)) {
      read = now;
    } else if (read.block != now.block) {
      read.block = kMany;
    } else if (read.barriers < now.barriers) {
      read = now;
    } else if (read.warp != now.warp) {
      read.warp = read.thread = kMany;
    } else if (read.of_warp < now.of_warp) {
      read = now;
    } else if (read.thread != now.thread) {
      read.thread = kMany;
    }
  }
}

}  // namespace

void note(Access access, const void* at, std::size_t bytes, const void* code) {
  look(access, reinterpret_cast<u64>(at), bytes, code);
}

namespace races {

void begin_launch() {
  if (data_begin == 0) dl_iterate_phdr(find_data, nullptr);
  launches++;
}

void begin_block(u64 number, int threads) {
  block = u32(number);
  barriers = 0;
  of_warps.assign((u32(threads) + kWarp - 1) / kWarp, 0);
  requests::begin(u32(of_warps.size()));
}

void order_block() { barriers++; }
void order_warp(int warp) { of_warps[std::size_t(warp)]++; }
void meet_warp(int warp) { requests::end(u32(warp)); }

}  // namespace races
}  // namespace emulator

// What the compiler calls.
#define TOUCH(name, access, size)                                                                       \
  void __tsan_##name##size(void* at) {                                                                  \
    emulator::look(emulator::Access::access, reinterpret_cast<u64>(at), size, __builtin_return_address(0)); \
  }
#define SIZES(name, access)                                                                          \
  TOUCH(name, access, 1) TOUCH(name, access, 2) TOUCH(name, access, 4) TOUCH(name, access, 8)        \
  TOUCH(name, access, 16)

extern "C" {
SIZES(read, Read)
SIZES(write, Write)
SIZES(unaligned_read, Read)
SIZES(unaligned_write, Write)
void __tsan_read_range(void* at, std::size_t bytes) {
  emulator::look(emulator::Access::Read, reinterpret_cast<u64>(at), bytes, __builtin_return_address(0));
}
void __tsan_write_range(void* at, std::size_t bytes) {
  emulator::look(emulator::Access::Write, reinterpret_cast<u64>(at), bytes, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
