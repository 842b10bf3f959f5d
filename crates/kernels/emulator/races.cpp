// Every load and store of a kernel comes by here: the compiler is told to look for races (-fsanitize=thread), but its own
// library, which knows nothing of blocks and warps, is not linked.
//
// Two threads may touch the same byte, one of them writing, only if something is between: the end of the kernel; for
// threads of a block a barrier, of a warp also __syncwarp. Shuffles and votes order nothing. Atomics race with none of
// their own kind. What an asynchronous copy writes nobody touches before it was waited for, and what it reads nobody
// changes, not even the thread that copies.
#include "races.hpp"

#include "requests.hpp"

#include <map>
#include <memory>
#include <mutex>
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
  // Copies on their way to it and from it.
  u16 arriving = 0, leaving = 0;
};

struct Page {
  Byte bytes[kPage];
};

constexpr u32 kCopy = 16;

// Whatever a kernel uses is never destroyed: one may still run when the process ends.
auto& pages = *new std::unordered_map<u64, std::unique_ptr<Page>>;
u64 last_number = ~u64(0);
Page* last_page;

u32 launches, block, barriers;
auto& of_warps = *new std::vector<u32>;
// Where the library lies, and in it the static shared memory of all kernels.
u64 code_begin, code_end, data_begin, data_end;

// Memory of devices, by its first byte; none if nobody says whose memory is whose.
std::mutex owned_mutex;
auto& owned = *new std::map<u64, u64>;
auto& gone = *new std::vector<std::pair<u64, u64>>;

int find_data(dl_phdr_info* info, std::size_t, void*) {
  const u64 here = reinterpret_cast<u64>(&current);
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& segment = info->dlpi_phdr[i];
    const u64 begin = info->dlpi_addr + segment.p_vaddr, end = begin + segment.p_memsz;
    if (segment.p_type != PT_LOAD) continue;
    if (code_begin == 0) code_begin = begin;
    code_end = end;
    if ((segment.p_flags & PF_W) && begin <= here && here < end) {
      data_begin = begin;
      data_end = end;
    }
  }
  if (data_begin == 0) code_begin = 0;
  return data_begin != 0;
}

bool is_owned(u64 at, std::size_t bytes) {
  if (code_begin <= at && at < code_end) return true;
  const std::lock_guard<std::mutex> lock(owned_mutex);
  if (owned.empty()) return true;
  auto found = owned.upper_bound(at);
  if (found == owned.begin()) return false;
  --found;
  return at + bytes <= found->first + found->second;
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

// Where in the code: what addr2line wants.
std::string place(const void* code) {
  Dl_info info{};
  dladdr(code, &info);
  char text[512];
  std::snprintf(text, sizeof text, "; see addr2line -e %s %#llx", info.dli_fname ? info.dli_fname : "?",
                u64(code) - reinterpret_cast<u64>(info.dli_fbase));
  return text;
}

[[noreturn]] void race(const char* what, const Touch& first, const Touch& now, u64 at, const void* code, bool shared) {
  std::fprintf(stderr,
               "race in kernel %s, %s memory at %#llx: thread %u of block %u %s what thread %d of block %d touched after "
               "%u barriers of %u%s\n",
               kernel(), shared ? "shared" : "global", at, now.thread, now.block, what, int(first.thread),
               int(first.block), first.barriers, now.barriers, place(code).c_str());
  std::abort();
}

[[noreturn]] void wrong(const char* what, u64 at, std::size_t bytes, const void* code) {
  std::fprintf(stderr, "kernel %s, thread %d of block %u, %zu bytes at %#llx: %s%s\n", kernel(), active_thread(), block,
               bytes, at, what, place(code).c_str());
  std::abort();
}

void look(Access access, u64 at, std::size_t bytes, const void* code) {
  // What notes the kernels is compiled with them, and runs before any.
  if (launches == 0 || is_stack(reinterpret_cast<void*>(at))) return;
  const u64 self = reinterpret_cast<u64>(&current);
  if (self <= at && at < self + sizeof current) return;
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && at % bytes != 0) wrong("a GPU refuses addresses that are not aligned", at, bytes, code);
  const bool shared = is_shared(at), is_atomic = access == Access::Atomic;
  if (!shared && !is_owned(at, bytes)) wrong("this is no memory of the device", at, bytes, code);
  const u32 thread = u32(active_thread());
  requests::note(thread, at, u32(bytes), shared, code);
  const u32 warp = thread / kWarp;
  const Touch now{launches, block, warp, thread, barriers, of_warps[warp], is_atomic};
  for (u64 i = at; i < at + bytes; i++) {
    Byte& byte = byte_at(i);
    Touch& written = byte.written;
    Touch& read = byte.read;
    if (byte.arriving) wrong("a copy to it is on its way", i, 1, code);
    if (byte.leaving && (access == Access::Write || is_atomic)) wrong("a copy from it is on its way", i, 1, code);
    if (shared && access == Access::Read && (written.launch != now.launch || written.block != now.block)) {
      wrong("shared memory that the block has not written", i, 1, code);
    }
    const bool both_atomic = is_atomic && written.is_atomic;
    if (!both_atomic && !is_before(written, now, shared)) {
      race(access == Access::Write ? "overwrites" : "reads", written, now, i, code, shared);
    }
    if (access == Access::Constant && written.launch == now.launch && !shared) {
      race("takes for constant", written, now, i, code, shared);
    }
    if (access == Access::Write || is_atomic) {
      if (!is_before(read, now, shared)) race("overwrites", read, now, i, code, shared);
      const bool is_one_of_many = both_atomic && !is_before(written, now, shared);
      const bool same_block = written.block == now.block;
      written = now;
      if (is_one_of_many) {
        written.warp = written.thread = kMany;
        if (!same_block) written.block = kMany;
      }
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

void own(u64 first, u64 bytes) {
  const std::lock_guard<std::mutex> lock(owned_mutex);
  owned[first] = bytes;
}

void disown(u64 first) {
  const std::lock_guard<std::mutex> lock(owned_mutex);
  const auto found = owned.find(first);
  // A kernel may run that has these pages; they are forgotten at the next launch.
  if (found != owned.end()) gone.push_back(*found), owned.erase(found);
}

namespace races {

void begin_launch() {
  std::vector<std::pair<u64, u64>> old;
  {
    const std::lock_guard<std::mutex> lock(owned_mutex);
    old.swap(gone);
  }
  for (const auto& [first, bytes] : old) {
    for (u64 number = first / kPage; number <= (first + bytes - 1) / kPage; number++) pages.erase(number);
    last_number = ~u64(0);
  }
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

void depart(const void* to, const void* from, const void* code) {
  for (u64 i = reinterpret_cast<u64>(to), end = i + kCopy; i < end; i++) {
    Byte& byte = byte_at(i);
    if (byte.arriving) wrong("two copies to it are on their way", i, 1, code);
    byte.arriving++;
  }
  if (!from) return;
  for (u64 i = reinterpret_cast<u64>(from), end = i + kCopy; i < end; i++) byte_at(i).leaving++;
}

void land(const void* to, const void* from) {
  for (u64 i = reinterpret_cast<u64>(to), end = i + kCopy; i < end; i++) byte_at(i).arriving--;
  if (!from) return;
  for (u64 i = reinterpret_cast<u64>(from), end = i + kCopy; i < end; i++) byte_at(i).leaving--;
}

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
