#include "cubin.hpp"

#include <cstring>

#include <elf.h>

namespace cubin {

namespace {

// Section of attributes: of each a format, a number, and two bytes of size or value.
constexpr uint8_t kSized = 4, kMaxThreads = 5;

uint32_t threads_max(const uint8_t* at, std::size_t bytes) {
  for (std::size_t i = 0; i + 4 <= bytes;) {
    uint16_t size;
    std::memcpy(&size, at + i + 2, sizeof size);
    if (at[i] == kSized && at[i + 1] == kMaxThreads && 12 <= size && i + 16 <= bytes) {
      uint32_t dims[3];
      std::memcpy(dims, at + i + 4, sizeof dims);
      return dims[0] * dims[1] * dims[2];
    }
    i += 4 + (at[i] == kSized ? size : 0);
  }
  return 1024;
}

}  // namespace

std::map<std::string, Kernel> kernels(const void* image) {
  std::map<std::string, Kernel> found;
  const auto* bytes = static_cast<const uint8_t*>(image);
  const auto* head = static_cast<const Elf64_Ehdr*>(image);
  constexpr Elf64_Half kMachine = 190;  // EM_CUDA
  if (std::memcmp(head->e_ident, ELFMAG, SELFMAG) != 0 || head->e_machine != kMachine) return found;
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes + head->e_shoff);
  const auto* names = reinterpret_cast<const char*>(bytes + sections[head->e_shstrndx].sh_offset);
  auto each = [&](const std::string& prefix, auto visit) {
    for (int i = 0; i < head->e_shnum; i++) {
      const std::string name = names + sections[i].sh_name;
      if (name.rfind(prefix, 0) == 0) visit(name.substr(prefix.size()), sections[i]);
    }
  };
  each(".text.", [&](const std::string& name, const Elf64_Shdr& section) {
    found[name].registers = section.sh_info >> 24;
  });
  each(".nv.info.", [&](const std::string& name, const Elf64_Shdr& section) {
    if (found.count(name)) found[name].threads_max = threads_max(bytes + section.sh_offset, section.sh_size);
  });
  each(".nv.shared.", [&](const std::string& name, const Elf64_Shdr& section) {
    if (found.count(name)) found[name].shared = uint32_t(section.sh_size);
  });
  return found;
}

}  // namespace cubin
