// The devices that the stand-in for CUDA's driver has: contexts, streams, memory, and what is left to do.
#pragma once

#include "cubin.hpp"
#include "emulator.hpp"
#include "settings.hpp"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include <sys/mman.h>
#include <unistd.h>

extern "C" int herd_emulator_launch(const char*, const u32*, const u32*, u32, void**);

namespace stand_in {

using emulator::setting;

enum Result : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kDeinitialized = 4,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kNotFound = 500,
  kNotReady = 600,
  kIllegalAddress = 700,
};

inline const std::map<int, std::pair<const char*, const char*>> kNames = {
    {kSuccess, {"CUDA_SUCCESS", "no error"}},
    {kOutOfMemory, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {kDeinitialized, {"CUDA_ERROR_DEINITIALIZED", "driver shutting down"}},
    {kNoDevice, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
    {kInvalidDevice, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {kInvalidImage, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
    {kNotFound, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {kNotReady, {"CUDA_ERROR_NOT_READY", "device not ready"}},
    {kIllegalAddress, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
};

constexpr u64 kPage = 4096;
// As many calls wait in a stream.
constexpr std::size_t kQueue = 1024;
constexpr std::chrono::microseconds kAsked(200);
constexpr std::size_t kStaged = 64 << 10;
constexpr u32 kSharedFree = 48 << 10, kRegisters = 64 << 10;

[[noreturn]] inline void misuse(const std::string& what) {
  std::fprintf(stderr, "stand-in for CUDA's driver: %s\n", what.c_str());
  std::abort();
}

// Whether the call of this number is struck.
inline bool strikes(const char* name, u64 number) {
  const std::string value = setting(name);
  if (value.find('/') != std::string::npos) return unlink(value.c_str()) == 0;
  return !value.empty() && number == setting(name, 0);
}

struct Function {
  std::string name;
  const emulator::Kernel* kernel;
  cubin::Kernel limits;
  u32 shared_granted = kSharedFree;
};

// A launch with its parameters, which are taken when it is made.
struct Launch {
  std::string name;
  u32 grid[3], block[3], shared;
  std::vector<std::vector<u8>> parameters;
};

using Launches = std::vector<Launch>;

struct Stream {
  int device;
  std::deque<std::function<void()>> calls;
  // Calls that were made, that may run, and that have run.
  u64 made = 0, released = 0, done = 0;
  bool is_closed = false;
  std::unique_ptr<Launches> captured;
};

struct Event {
  int device;
  bool is_timed;
  std::shared_ptr<Stream> stream;
  u64 at = 0;
  std::shared_ptr<double> time;
};

struct Allocation {
  u64 bytes, start, length;
};

struct Device {
  int retained = 0;
  u64 used = 0;
  bool is_spoilt = false;
  std::map<u64, Allocation> memory;
};

struct State {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Device> devices;
  std::set<Stream*> threads;
  std::map<void*, std::shared_ptr<Stream>> streams;
  std::map<void*, std::unique_ptr<Event>> events;
  std::map<void*, std::size_t> pinned;
  std::map<void*, std::unique_ptr<Launches>> graphs;
  std::map<void*, std::shared_ptr<Launches>> executables;
  std::vector<std::unique_ptr<std::map<std::string, Function>>> modules;
  u64 allocations = 0, launches = 0;
  // The process ends.
  bool is_over = false;
};

// Never destroyed: threads use it until the process is gone.
inline State& state = *new State;
inline thread_local int current = -1;

using Lock = std::unique_lock<std::mutex>;

inline Device& device() {
  if (current < 0) misuse("a call without a current context");
  return state.devices[current];
}

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class Map>
auto& live(Map& map, void* handle, const char* what) {
  const auto found = map.find(handle);
  if (found == map.end()) misuse(std::string("no such ") + what);
  return found->second;
}

// Bytes from an address lie within one allocation of the current device.
inline void check_memory(u64 address, u64 bytes) {
  auto& memory = device().memory;
  auto found = memory.upper_bound(address);
  if (found == memory.begin()) misuse("a copy from or to memory that is not the device's");
  --found;
  if (found->first + found->second.bytes < address + bytes) misuse("a copy past the end of device memory");
}

inline bool is_pinned(const void* at, std::size_t bytes) {
  const auto* start = static_cast<const u8*>(at);
  for (const auto& [address, length] : state.pinned) {
    const auto* first = static_cast<u8*>(address);
    if (first <= start && start + bytes <= first + length) return true;
  }
  return false;
}

inline void run(const Launch& launch, int on) {
  {
    Lock lock(state.mutex);
    if (state.devices[on].is_spoilt) return;
    const u64 number = ++state.launches;
    if (strikes("faults", number)) {
      state.devices[on].is_spoilt = true;
      return;
    }
    if (strikes("hangs", number)) {
      for (;;) state.changed.wait(lock);
    }
  }
  std::vector<void*> pointers;
  for (const auto& parameter : launch.parameters) pointers.push_back(const_cast<u8*>(parameter.data()));
  herd_emulator_launch(launch.name.c_str(), launch.grid, launch.block, launch.shared, pointers.data());
}

// Runs what a stream was given, once it may.
inline void serve(std::shared_ptr<Stream> stream) {
  Lock lock(state.mutex);
  for (;;) {
    state.changed.wait(lock, [&] { return !state.is_over && (stream->done < stream->released || stream->is_closed); });
    if (stream->done == stream->made && stream->is_closed) break;
    auto call = std::move(stream->calls.front());
    stream->calls.pop_front();
    lock.unlock();
    call();
    lock.lock();
    stream->done++;
    state.changed.notify_all();
  }
  state.threads.erase(stream.get());
  state.changed.notify_all();
}

inline void release(Stream& stream, u64 until) {
  if (stream.released < until) {
    stream.released = until;
    state.changed.notify_all();
  }
}

// Waits until the device is through with what its streams were given so far, as CUDA's own calls would.
inline void drain(Lock& lock, int on) {
  std::vector<std::pair<Stream*, u64>> given;
  for (auto& [handle, stream] : state.streams) {
    if (stream->device == on) release(*stream, stream->made);
  }
  for (Stream* stream : state.threads) {
    if (stream->device == on) given.push_back({stream, stream->made});
  }
  state.changed.wait(lock, [&] {
    for (const auto& [stream, made] : given) {
      if (state.threads.count(stream) && stream->done < made) return false;
    }
    return true;
  });
}

inline void enqueue(Stream& stream, std::function<void()> call) {
  if (stream.captured) misuse("a call that a graph cannot have");
  if (stream.device != current) misuse("a stream of another context");
  stream.calls.push_back(std::move(call));
  stream.made++;
  if (kQueue < stream.made - stream.done) misuse("more calls than the driver's queue holds: this one may wait without a limit");
}

inline void at_exit() {
  Lock lock(state.mutex);
  for (int i = 0; i < int(state.devices.size()); i++) drain(lock, i);
  state.is_over = true;
}

inline void report_left(int on) {
  auto say = [](const char* what, std::size_t count) {
    if (count) misuse(std::to_string(count) + " " + what + " left when the context goes");
  };
  say("allocations", state.devices[on].memory.size());
  std::size_t streams = 0, events = 0;
  for (auto& [handle, stream] : state.streams) streams += stream->device == on;
  for (auto& [handle, event] : state.events) events += event->device == on;
  say("streams", streams);
  say("events", events);
  // Those have no device of their own here.
  if (state.devices.size() == 1) {
    say("pieces of pinned memory", state.pinned.size());
    say("graphs", state.graphs.size() + state.executables.size());
  }
}

}  // namespace stand_in
