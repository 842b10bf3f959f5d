#include "emulator.hpp"
#include "races.hpp"

#include <array>
#include <map>
#include <mutex>

#include <sys/mman.h>
#include <ucontext.h>

namespace emulator {

Thread current;

namespace {

constexpr std::size_t kStack = 128 * 1024;
constexpr int kWarp = 32;
constexpr u8 kPoison = 0xff;  // NaN, as float and as bf16

enum class State { Ready, Warp, Block, Done };

struct Fiber {
  dim3 thread;
  State state;
  int line;
  bool orders_memory;
#ifdef __x86_64__
  void* stack_pointer;
#else
  ucontext_t context;
#endif
};

struct Copy {
  void* to;
  const void* from;
  bool is_there;
  u32 group;
};

// Of one fiber: copies that nobody has waited for, and groups that were ended.
struct Copies {
  std::vector<Copy> open;
  u32 groups = 0;
};

// One launch at a time. Never destroyed: it may not be over when the process ends.
std::mutex running;
auto& fibers = *new std::vector<Fiber>;
auto& stacks = *new std::vector<u8*>;
auto& shared = *new std::vector<u8>;
// What the lanes of each warp bring to a collective; two, since some go on while others still read.
auto& brought = *new std::array<std::vector<u64>, 2>;
auto& turns = *new std::vector<int>;
auto& copies = *new std::vector<Copies>;
int active = 0;
Body body;
void** arguments;
const char* kernel_name = "";

std::map<std::string, Kernel>& kernels() {
  static auto& all = *new std::map<std::string, Kernel>;
  return all;
}

#ifdef __x86_64__
// Saves the callee's registers on the stack, leaves its pointer in `*save`, and goes on from `load`.
extern "C" void herd_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl herd_emulator_switch
.hidden herd_emulator_switch
herd_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void* scheduler;
void leave() { herd_emulator_switch(&fibers[active].stack_pointer, scheduler); }
void resume(int index) { herd_emulator_switch(&scheduler, fibers[index].stack_pointer); }
#else
ucontext_t scheduler;
void leave() { swapcontext(&fibers[active].context, &scheduler); }
void resume(int index) { swapcontext(&scheduler, &fibers[index].context); }
#endif

[[noreturn]] void begin() {
  body(arguments);
  fibers[active].state = State::Done;
  leave();
  fail("a thread went on after its end");
}

void prepare(int index) {
  while (int(stacks.size()) <= index) {
    stacks.push_back(static_cast<u8*>(std::malloc(kStack)));
  }
  Fiber& fiber = fibers[index];
#ifdef __x86_64__
  auto* top = reinterpret_cast<u64*>(reinterpret_cast<std::uintptr_t>(stacks[index] + kStack) & ~std::uintptr_t(15));
  // As if `begin` had been called: its stack is aligned but for the return address.
  *--top = 0;
  *--top = reinterpret_cast<u64>(&begin);
  for (int i = 0; i < 6; i++) *--top = 0;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks[index];
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, reinterpret_cast<void (*)()>(&begin), 0);
#endif
}

// Lets every ready lane of a warp run to its next wait, until the warp waits for the block or is done.
void run_warp(int first, int last) {
  for (;;) {
    for (int i = first; i < last; i++) {
      if (fibers[i].state != State::Ready) continue;
      active = i;
      current.thread = fibers[i].thread;
      resume(i);
    }
    int waiting = 0;
    for (int i = first; i < last; i++) waiting += fibers[i].state == State::Warp;
    if (waiting == 0) return;
    if (waiting != last - first) fail("a collective that not all lanes of the warp reach");
    for (int i = first; i < last; i++) {
      if (fibers[i].line != fibers[first].line) fail("lanes of a warp wait at different collectives");
      fibers[i].state = State::Ready;
    }
    races::meet_warp(first / kWarp);
    if (fibers[first].orders_memory) races::order_warp(first / kWarp);
  }
}

void run_block() {
  const int count = int(fibers.size());
  std::fill(shared.begin(), shared.end(), kPoison);
  std::fill(turns.begin(), turns.end(), 0);
  for (Copies& of_thread : copies) {
    // What the block before has not waited for.
    for (const Copy& copy : of_thread.open) races::land(copy.to, copy.is_there ? copy.from : nullptr);
    of_thread = {};
  }
  races::begin_block(current.block.x + current.grid_size.x * (current.block.y + u64(current.grid_size.y) * current.block.z), count);
  for (int i = 0; i < count; i++) {
    fibers[i].state = State::Ready;
    prepare(i);
  }
  for (;;) {
    for (int first = 0; first < count; first += kWarp) run_warp(first, min(first + kWarp, count));
    for (int first = 0; first < count; first += kWarp) races::meet_warp(first / kWarp);
    bool any = false, all = true;
    for (Fiber& fiber : fibers) {
      any |= fiber.state == State::Block;
      all &= fiber.state == State::Block || fiber.state == State::Done;
    }
    if (!any) return;
    if (!all) fail("a barrier that not all threads reach");
    races::order_block();
    for (Fiber& fiber : fibers) {
      if (fiber.state == State::Block) fiber.state = State::Ready;
    }
  }
}

}  // namespace

u8* dynamic_shared() { return shared.data(); }

void wait_block() {
  fibers[active].state = State::Block;
  leave();
}

const u64* exchange(u32 mask, u64 value, int line) {
  if (mask != 0xffffffffu) fail("a collective of some lanes only");
  if (fibers.size() % kWarp != 0) fail("a collective in a block of broken warps");
  const int turn = turns[active]++ % 2;
  brought[turn][active] = value;
  fibers[active].state = State::Warp;
  fibers[active].line = line;
  fibers[active].orders_memory = false;
  const int first = active / kWarp * kWarp;
  leave();
  return &brought[turn][first];
}

void wait_warp(int line) {
  if (fibers.size() % kWarp != 0) fail("a collective in a block of broken warps");
  fibers[active].state = State::Warp;
  fibers[active].line = line;
  fibers[active].orders_memory = true;
  leave();
}

int active_thread() { return active; }

const char* kernel() { return kernel_name; }

bool is_stack(const void* at) {
  const auto* stack = stacks[active];
  return stack <= at && at < stack + kStack;
}

bool is_dynamic_shared(const void* at) {
  return shared.data() <= at && at < shared.data() + shared.size();
}

void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel %s, block (%u, %u, %u), thread %u: %s\n", kernel_name, current.block.x,
               current.block.y, current.block.z, current.thread.x, what);
  std::abort();
}

void add(const char* name, Kernel kernel) { kernels()[name] = std::move(kernel); }

const Kernel* find(const std::string& name) {
  const auto found = kernels().find(name);
  return found == kernels().end() ? nullptr : &found->second;
}

}  // namespace emulator

void herd_mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, int line) {
  // Registers of all lanes, two at a time.
  u64 registers[3][32];
  const u64 mine[3] = {u64(a[0]) | u64(a[1]) << 32, u64(a[2]) | u64(a[3]) << 32, u64(b0) | u64(b1) << 32};
  for (int i = 0; i < 3; i++) {
    std::memcpy(registers[i], emulator::exchange(0xffffffffu, mine[i], line), sizeof registers[i]);
  }
  // Element (row, k) of a: lane 4 * (row % 8) + k % 8 / 2, register row / 8 + 2 * (k / 8), half k % 2.
  auto a_at = [&](int row, int k) {
    const int index = row / 8 + 2 * (k / 8);
    const u32 word = u32(registers[index / 2][4 * (row % 8) + k % 8 / 2] >> 32 * (index % 2));
    return herd_bf16(word >> 16 * (k % 2) & 0xffffu);
  };
  // Element (k, column) of b: lane 4 * column + k % 8 / 2, register k / 8, half k % 2.
  auto b_at = [&](int k, int column) {
    const u32 word = u32(registers[2][4 * column + k % 8 / 2] >> 32 * (k / 8));
    return herd_bf16(word >> 16 * (k % 2) & 0xffffu);
  };
  const int group = emulator::lane() / 4, pair = emulator::lane() % 4;
  for (int i = 0; i < 4; i++) {
    const int row = group + 8 * (i / 2), column = 2 * pair + i % 2;
    for (int k = 0; k < 16; k++) d[i] = std::fmaf(a_at(row, k), b_at(k, column), d[i]);
  }
}

void copy_async(void* to, const void* from, bool is_there) {
  emulator::Copies& mine = emulator::copies[emulator::active];
  // It may happen at once, or at any time until it is waited for.
  const void* code = __builtin_return_address(0);
  if (is_there) emulator::note(emulator::Access::Read, from, 16, code);
  emulator::note(emulator::Access::Write, to, 16, code);
  emulator::races::depart(to, is_there ? from : nullptr, code);
  mine.open.push_back({to, from, is_there, mine.groups});
}

void copy_commit() { emulator::copies[emulator::active].groups++; }

void herd_copy_wait(int groups) {
  emulator::Copies& mine = emulator::copies[emulator::active];
  std::size_t done = 0;
  while (done < mine.open.size() && int(mine.open[done].group) < int(mine.groups) - groups) {
    const emulator::Copy& copy = mine.open[done++];
    emulator::races::land(copy.to, copy.is_there ? copy.from : nullptr);
    emulator::note(emulator::Access::Write, copy.to, 16);
    if (copy.is_there) std::memcpy(copy.to, copy.from, 16);
    else std::memset(copy.to, 0, 16);
  }
  mine.open.erase(mine.open.begin(), mine.open.begin() + done);
}

extern "C" {

// 0 if the kernel ran, 1 if there is none of this name.
int herd_emulator_launch(const char* name, const u32* grid, const u32* block, u32 shared_bytes, void** args) {
  using namespace emulator;
  const std::lock_guard<std::mutex> lock(running);
  const auto found = kernels().find(name);
  if (found == kernels().end()) return 1;
  races::begin_launch();
  body = found->second.body;
  kernel_name = found->first.c_str();
  arguments = args;
  const u32 count = block[0] * block[1] * block[2];
  fibers.resize(count);
  turns.resize(count);
  copies.resize(count);
  for (auto& all : brought) all.resize(count);
  shared.assign(shared_bytes + 16, kPoison);
  for (u32 i = 0; i < count; i++) {
    fibers[i].thread = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
  }
  current.block_size = {block[0], block[1], block[2]};
  current.grid_size = {grid[0], grid[1], grid[2]};
  for (u32 z = 0; z < grid[2]; z++) {
    for (u32 y = 0; y < grid[1]; y++) {
      for (u32 x = 0; x < grid[0]; x++) {
        current.block = {x, y, z};
        run_block();
      }
    }
  }
  return 0;
}
}
