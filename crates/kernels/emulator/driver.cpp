// A CUDA driver without a GPU, as libcuda.so.1: what herd does with the true one, with kernels that are emulated.
//
// It is stricter than it. Work starts only when somebody waits for it, on a thread of its stream, so what reads too
// early or writes too soon is noticed. Memory that was freed has no rights left, device memory that was never written
// is no number, and a call that CUDA does not allow, or that might wait without a limit, ends the process with a word.
//
// HERD_STAND_IN, a list such as `memory_mib=64,hangs=100`, says what the device is like:
//   devices, version, capability, shared     numbers as CUDA gives them (capability 90 is 9.0)
//   memory_mib                               of a device
//   refuses                                  an allocation finds no memory
//   faults                                   a launch touches memory that is not there
//   hangs                                    a launch never ends
// Of the last three the value says which one of the process; or it is a file, and the next one after that is there:
// whichever process takes it away first.
#include "stand_in.hpp"

using namespace stand_in;

// The current device, or what it failed of.
#define ENTER()                                       \
  Lock lock(state.mutex);                             \
  if (state.is_over) return kDeinitialized;           \
  if (device().is_spoilt) return kIllegalAddress

extern "C" {

int cuInit(unsigned) {
  static std::once_flag once;
  std::call_once(once, [] {
    state.devices.resize(setting("devices", 1));
    std::atexit(at_exit);
  });
  return state.devices.empty() ? kNoDevice : kSuccess;
}

// NVRTC asks the driver for what nobody else is told of.
int cuGetExportTable(const void** table, const void*) {
  *table = nullptr;
  return kNotFound;
}

int cuDriverGetVersion(int* version) {
  *version = int(setting("version", 13000));
  return kSuccess;
}

int cuGetErrorName(int error, const char** text) {
  const auto found = kNames.find(error);
  *text = found == kNames.end() ? nullptr : found->second.first;
  return *text ? kSuccess : kInvalidValue;
}

int cuGetErrorString(int error, const char** text) {
  const auto found = kNames.find(error);
  *text = found == kNames.end() ? nullptr : found->second.second;
  return *text ? kSuccess : kInvalidValue;
}

int cuDeviceGetCount(int* count) {
  *count = int(state.devices.size());
  return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < int(state.devices.size()) ? kSuccess : kInvalidDevice;
}

int cuDeviceGetName(char* name, int bytes, int) {
  std::snprintf(name, bytes, "no GPU, its kernels are emulated");
  return kSuccess;
}

int cuDeviceGetPCIBusId(char* id, int bytes, int device) {
  std::snprintf(id, bytes, "0000:%02x:00.0", 0x17 + device);
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  const u64 capability = setting("capability", 90);
  switch (attribute) {
    case 75: *value = int(capability / 10); return kSuccess;
    case 76: *value = int(capability % 10); return kSuccess;
    case 97: *value = int(setting("shared", 227 << 10)); return kSuccess;
    default: misuse("an attribute of the device that it does not know");
  }
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  Lock lock(state.mutex);
  state.devices[device].retained++;
  *context = &state.devices[device];
  return kSuccess;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
  Lock lock(state.mutex);
  if (--state.devices[device].retained < 0) misuse("a context that was released twice");
  if (state.devices[device].retained) return kSuccess;
  drain(lock, device);
  // What it failed of takes everything with it.
  if (!state.devices[device].is_spoilt) report_left(device);
  return kSuccess;
}

int cuCtxSetCurrent(void* context) {
  Lock lock(state.mutex);
  current = context ? int(static_cast<Device*>(context) - state.devices.data()) : -1;
  if (0 <= current && state.devices[current].retained == 0) misuse("a context that was released");
  return kSuccess;
}

int cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  ENTER();
  *total = setting("memory_mib", 2048) << 20;
  *free = *total - device().used;
  return kSuccess;
}

int cuMemAlloc_v2(u64* address, std::size_t bytes) {
  ENTER();
  if (bytes == 0) misuse("an allocation of nothing");
  const u64 total = setting("memory_mib", 2048) << 20;
  if (strikes("refuses", ++state.allocations) || total < device().used + bytes) return kOutOfMemory;
  const u64 length = (bytes + kPage - 1) / kPage * kPage + kPage;
  void* start = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return kOutOfMemory;
  mprotect(static_cast<u8*>(start) + length - kPage, kPage, PROT_NONE);
  std::memset(start, 0xff, length - kPage);
  const u64 first = reinterpret_cast<u64>(start);
  *address = first + length - kPage - (bytes + 15) / 16 * 16;
  device().memory[*address] = {bytes, first, length};
  emulator::own(*address, bytes);
  device().used += bytes;
  return kSuccess;
}

int cuMemFree_v2(u64 address) {
  ENTER();
  auto& memory = device().memory;
  const auto found = memory.find(address);
  if (found == memory.end()) misuse("device memory that was not allocated, or is free already");
  // Its addresses are never given again: whoever still uses them is noticed.
  void* start = reinterpret_cast<void*>(found->second.start);
  mmap(start, found->second.length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  emulator::disown(address);
  device().used -= found->second.bytes;
  memory.erase(found);
  return kSuccess;
}

int cuMemHostAlloc(void** address, std::size_t bytes, unsigned) {
  ENTER();
  *address = std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
  state.pinned[*address] = bytes;
  return kSuccess;
}

int cuMemFreeHost(void* address) {
  ENTER();
  live(state.pinned, address, "pinned memory");
  state.pinned.erase(address);
  std::free(address);
  return kSuccess;
}

int cuStreamCreate(void** handle, unsigned flags) {
  ENTER();
  if (flags != 1) misuse("a stream that waits for the default one");
  auto stream = std::make_shared<Stream>();
  stream->device = current;
  *handle = stream.get();
  state.streams[*handle] = stream;
  state.threads.insert(stream.get());
  std::thread(serve, stream).detach();
  return kSuccess;
}

int cuStreamDestroy_v2(void* handle) {
  Lock lock(state.mutex);
  auto& stream = live(state.streams, handle, "stream");
  if (stream->captured) misuse("a stream that is destroyed while a graph is captured");
  release(*stream, stream->made);
  stream->is_closed = true;
  state.changed.notify_all();
  state.streams.erase(handle);
  return device().is_spoilt ? kIllegalAddress : kSuccess;
}

int cuStreamBeginCapture_v2(void* handle, int) {
  ENTER();
  auto& stream = live(state.streams, handle, "stream");
  if (stream->captured) misuse("a capture within a capture");
  stream->captured = std::make_unique<Launches>();
  return kSuccess;
}

int cuStreamEndCapture(void* handle, void** graph) {
  ENTER();
  auto& stream = live(state.streams, handle, "stream");
  if (!stream->captured) misuse("the end of a capture that was not begun");
  *graph = stream->captured.get();
  state.graphs[*graph] = std::move(stream->captured);
  return kSuccess;
}

int cuGraphInstantiateWithFlags(void** executable, void* graph, u64) {
  ENTER();
  auto launches = std::make_shared<Launches>(*live(state.graphs, graph, "graph"));
  *executable = launches.get();
  state.executables[*executable] = launches;
  return kSuccess;
}

int cuGraphDestroy(void* graph) {
  Lock lock(state.mutex);
  live(state.graphs, graph, "graph");
  state.graphs.erase(graph);
  return kSuccess;
}

int cuGraphUpload(void* executable, void* stream) {
  ENTER();
  live(state.executables, executable, "graph");
  enqueue(*live(state.streams, stream, "stream"), [] {});
  return kSuccess;
}

int cuGraphLaunch(void* executable, void* stream) {
  ENTER();
  auto launches = live(state.executables, executable, "graph");
  enqueue(*live(state.streams, stream, "stream"), [launches, on = current] {
    for (const Launch& launch : *launches) run(launch, on);
  });
  return kSuccess;
}

int cuGraphExecDestroy(void* executable) {
  Lock lock(state.mutex);
  live(state.executables, executable, "graph");
  state.executables.erase(executable);
  return kSuccess;
}

int cuEventCreate(void** handle, unsigned flags) {
  ENTER();
  auto event = std::make_unique<Event>();
  event->device = current;
  event->is_timed = !(flags & 2);
  *handle = event.get();
  state.events[*handle] = std::move(event);
  return kSuccess;
}

int cuEventRecord(void* handle, void* stream) {
  ENTER();
  auto& event = live(state.events, handle, "event");
  event->stream = live(state.streams, stream, "stream");
  auto time = event->time = std::make_shared<double>(0);
  enqueue(*event->stream, [time] { *time = now(); });
  event->at = event->stream->made;
  return kSuccess;
}

int cuEventQuery(void* handle) {
  ENTER();
  auto& event = live(state.events, handle, "event");
  const auto stream = event->stream;
  const u64 at = event->at;
  if (!stream || at <= stream->done) return kSuccess;
  release(*stream, at);
  // Whoever asks does so again and again, and would keep the processor from those who do the work.
  state.changed.wait_for(lock, kAsked, [&] { return at <= stream->done; });
  if (device().is_spoilt) return kIllegalAddress;
  return at <= stream->done ? kSuccess : kNotReady;
}

int cuEventElapsedTime_v2(float* milliseconds, void* from, void* to) {
  ENTER();
  auto& first = live(state.events, from, "event");
  auto& second = live(state.events, to, "event");
  for (auto* event : {first.get(), second.get()}) {
    if (!event->is_timed || !event->stream) misuse("the time of an event that has none");
    if (event->stream->done < event->at) return kNotReady;
  }
  *milliseconds = float((*second->time - *first->time) * 1e3);
  return kSuccess;
}

int cuEventDestroy_v2(void* handle) {
  Lock lock(state.mutex);
  live(state.events, handle, "event");
  state.events.erase(handle);
  return device().is_spoilt ? kIllegalAddress : kSuccess;
}

int cuMemcpyHtoDAsync_v2(u64 to, const void* from, std::size_t bytes, void* stream) {
  ENTER();
  check_memory(to, bytes);
  auto& queue = *live(state.streams, stream, "stream");
  void* target = reinterpret_cast<void*>(to);
  if (is_pinned(from, bytes)) {
    enqueue(queue, [=] { std::memcpy(target, from, bytes); });
    return kSuccess;
  }
  if (kStaged < bytes) misuse("a large copy out of memory that is not pinned, which may wait without a limit");
  const auto* first = static_cast<const u8*>(from);
  enqueue(queue, [target, staged = std::vector<u8>(first, first + bytes)] {
    std::memcpy(target, staged.data(), staged.size());
  });
  return kSuccess;
}

int cuMemcpyDtoHAsync_v2(void* to, u64 from, std::size_t bytes, void* stream) {
  ENTER();
  check_memory(from, bytes);
  if (!is_pinned(to, bytes)) misuse("a copy to memory that is not pinned, which may wait without a limit");
  // Until it is there it is not what it was.
  std::memset(to, 0xff, bytes);
  const void* source = reinterpret_cast<void*>(from);
  enqueue(*live(state.streams, stream, "stream"), [=] { std::memcpy(to, source, bytes); });
  return kSuccess;
}

int cuModuleLoadData(void** module, const void* image) {
  ENTER();
  auto functions = std::make_unique<std::map<std::string, Function>>();
  for (const auto& [name, limits] : cubin::kernels(image)) {
    if (const emulator::Kernel* kernel = emulator::find(name)) (*functions)[name] = {name, kernel, limits};
  }
  if (functions->empty()) return kInvalidImage;
  *module = functions.get();
  state.modules.push_back(std::move(functions));
  return kSuccess;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  ENTER();
  auto& functions = *static_cast<std::map<std::string, Function>*>(module);
  const auto found = functions.find(name);
  if (found == functions.end()) return kNotFound;
  *function = &found->second;
  return kSuccess;
}

int cuFuncSetAttribute(void* handle, int attribute, int value) {
  ENTER();
  auto& function = *static_cast<Function*>(handle);
  if (attribute != 8) misuse("an attribute of a kernel that it does not know");
  if (setting("shared", 227 << 10) < value + u64(function.limits.shared)) misuse("more shared memory than a block has");
  function.shared_granted = u32(value);
  return kSuccess;
}

int cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, void* stream, void** parameters, void** extra) {
  ENTER();
  const auto& function = *static_cast<Function*>(handle);
  const u64 threads = u64(block_x) * block_y * block_z;
  auto wrong = [&](const std::string& what) { misuse("launch of " + function.name + ": " + what); };
  if (extra) wrong("parameters in a form that it does not know");
  if (!threads || !grid_x || !grid_y || !grid_z) wrong("no threads");
  if (0x7fffffff < grid_x || 0xffff < grid_y || 0xffff < grid_z) wrong("too large a grid");
  if (function.limits.threads_max < threads) wrong(std::to_string(threads) + " threads, it was compiled for " + std::to_string(function.limits.threads_max));
  const u64 warps = (threads + 31) / 32, of_a_warp = (function.limits.registers * 32 + 255) / 256 * 256;
  if (!function.limits.registers || kRegisters < warps * of_a_warp) wrong("more registers than there are");
  if (function.shared_granted < shared + (function.shared_granted == kSharedFree ? function.limits.shared : 0)) wrong("more shared memory than it was granted");
  Launch launch{function.name, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, {}};
  for (std::size_t i = 0; i < function.kernel->parameters.size(); i++) {
    const auto* first = static_cast<const u8*>(parameters[i]);
    launch.parameters.emplace_back(first, first + function.kernel->parameters[i]);
  }
  auto& queue = *live(state.streams, stream, "stream");
  if (queue.captured) {
    queue.captured->push_back(std::move(launch));
    return kSuccess;
  }
  enqueue(queue, [launch = std::move(launch), on = current] { run(launch, on); });
  return kSuccess;
}
}
