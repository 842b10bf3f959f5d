#include "requests.hpp"

#include "races.hpp"
#include "settings.hpp"

#include <algorithm>
#include <array>
#include <map>
#include <tuple>
#include <unordered_map>

#include <dlfcn.h>
#include <unistd.h>

namespace emulator::requests {

namespace {

constexpr u32 kWarp = 32, kSector = 32, kBanks = 32, kBank = 4;

// Of a warp: what its lanes have touched for the n-th time at a place of the code since they met.
struct Request {
  u32 bytes = 0;
  bool shared = false;
  std::vector<u64> at;
};

struct Warp {
  // By place of the code: how often each lane came by, and the requests.
  struct Place {
    std::array<u32, kWarp> times{};
    std::vector<Request> requests;
  };
  // A copy is at the same place of the code for both kinds of memory.
  std::unordered_map<const void*, Place> places[2];
};

// All requests of a place of a kernel. `cost` are sectors of global memory, or passes over the banks of shared memory;
// `least` is what the same bytes take at best.
struct Sum {
  u32 bytes = 0;
  u64 requests = 0, cost = 0, least = 0;
};

auto& warps = *new std::vector<Warp>;
auto& sums = *new std::map<std::tuple<std::string, const void*, bool>, Sum>;

// Each process has one.
const char* file() {
  static const std::string folder = setting("accesses"), path = folder + "/" + std::to_string(getpid());
  return folder.empty() ? nullptr : path.c_str();
}

u64 distinct(std::vector<u64> all) {
  std::sort(all.begin(), all.end());
  return u64(std::unique(all.begin(), all.end()) - all.begin());
}

// Lanes that touch 16 bytes each take turns, eight at a time; with 8 bytes sixteen. In a turn each bank gives one word.
u64 passes(const Request& request) {
  const std::size_t lanes = kWarp * kBank / std::max(request.bytes, kBank);
  u64 all = 0;
  for (std::size_t first = 0; first < request.at.size(); first += lanes) {
    std::array<std::vector<u64>, kBanks> words;
    for (std::size_t i = first; i < std::min(first + lanes, request.at.size()); i++) {
      for (u64 at = request.at[i] / kBank; at <= (request.at[i] + request.bytes - 1) / kBank; at++) {
        words[at % kBanks].push_back(at);
      }
    }
    u64 most = 0;
    for (auto& of_bank : words) most = std::max(most, distinct(of_bank));
    all += most;
  }
  return all;
}

u64 sectors(const Request& request) {
  std::vector<u64> all;
  for (u64 at : request.at) {
    for (u64 sector = at / kSector; sector <= (at + request.bytes - 1) / kSector; sector++) all.push_back(sector);
  }
  return distinct(std::move(all));
}

void add(const void* code, const Request& request) {
  Sum& sum = sums[{kernel(), code, request.shared}];
  sum.bytes = request.bytes;
  sum.requests++;
  // Many lanes may want the same bytes.
  std::vector<u64> of_all = request.at;
  const u64 bytes = distinct(std::move(of_all)) * request.bytes;
  if (request.shared) {
    sum.cost += passes(request);
    sum.least += (bytes + kBanks * kBank - 1) / (kBanks * kBank);
  } else {
    sum.cost += sectors(request);
    sum.least += (bytes + kSector - 1) / kSector;
  }
}

void write() {
  std::FILE* out = std::fopen(file(), "w");
  if (!out) return;
  for (const auto& [place, sum] : sums) {
    Dl_info info{};
    const auto& [name, code, shared] = place;
    dladdr(code, &info);
    const u64 offset = reinterpret_cast<u64>(code) - reinterpret_cast<u64>(info.dli_fbase);
    std::fprintf(out, "%s %#llx %s %u %llu %llu %llu\n", name.c_str(), offset, shared ? "shared" : "global", sum.bytes,
                 sum.requests, sum.cost, sum.least);
  }
  std::fclose(out);
}

}  // namespace

void begin(u32 count) {
  if (!file()) return;
  static const bool is_registered = std::atexit(write) == 0;
  (void)is_registered;
  warps.resize(count);
}

void note(u32 thread, u64 at, u32 bytes, bool shared, const void* code) {
  if (!file()) return;
  Warp::Place& place = warps[thread / kWarp].places[shared][code];
  const u32 time = place.times[thread % kWarp]++;
  if (place.requests.size() <= time) place.requests.resize(time + 1);
  Request& request = place.requests[time];
  request.bytes = bytes;
  request.shared = shared;
  request.at.push_back(at);
}

void end(u32 warp) {
  if (!file()) return;
  for (auto& places : warps[warp].places) {
    for (auto& [code, place] : places) {
      for (const Request& request : place.requests) add(code, request);
    }
    places.clear();
  }
}

}  // namespace emulator::requests
