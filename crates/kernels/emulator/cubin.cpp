#include "cubin.hpp"

#include <cstring>
#include <vector>

#include <elf.h>

namespace cubin {

namespace {

// Section of attributes: of each a format, a number, and two bytes of size or value.
constexpr uint8_t kSized = 4, kMaxThreads = 0x05, kRegisters = 0x2f;
// From Hopper on the system has so much of a block's shared memory, which its limit does not count.
constexpr uint32_t kReserved = 1024;

// Calls `visit(number, words)` for every attribute that has words.
template <class Visit>
void each_attribute(const uint8_t* at, std::size_t bytes, Visit visit) {
  for (std::size_t i = 0; i + 4 <= bytes;) {
    uint16_t size = 0;
    if (at[i] == kSized) std::memcpy(&size, at + i + 2, sizeof size);
    if (bytes < i + 4 + size) return;
    std::vector<uint32_t> words(size / 4);
    std::memcpy(words.data(), at + i + 4, words.size() * 4);
    visit(at[i + 1], words);
    i += 4 + size;
  }
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
  each(".text.", [&](const std::string& name, const Elf64_Shdr&) { found[name]; });
  // Symbols by their index.
  std::vector<std::string> symbols;
  each(".symtab", [&](const std::string&, const Elf64_Shdr& section) {
    const auto* all = reinterpret_cast<const Elf64_Sym*>(bytes + section.sh_offset);
    const auto* text = reinterpret_cast<const char*>(bytes + sections[section.sh_link].sh_offset);
    for (std::size_t i = 0; i < section.sh_size / sizeof *all; i++) symbols.push_back(text + all[i].st_name);
  });
  each(".nv.info", [&](const std::string& name, const Elf64_Shdr& section) {
    each_attribute(bytes + section.sh_offset, section.sh_size, [&](uint8_t number, const std::vector<uint32_t>& words) {
      if (name.empty() && number == kRegisters && words.size() == 2 && words[0] < symbols.size()) {
        const auto kernel = found.find(symbols[words[0]]);
        if (kernel != found.end()) kernel->second.registers = words[1];
      }
      if (!name.empty() && number == kMaxThreads && words.size() == 3) {
        const auto kernel = found.find(name.substr(1));
        if (kernel != found.end()) kernel->second.threads_max = words[0] * words[1] * words[2];
      }
    });
  });
  each(".nv.shared.", [&](const std::string& name, const Elf64_Shdr& section) {
    const auto kernel = found.find(name);
    const auto size = uint32_t(section.sh_size);
    if (kernel != found.end()) kernel->second.shared = size < kReserved ? size : size - kReserved;
  });
  return found;
}

}  // namespace cubin
