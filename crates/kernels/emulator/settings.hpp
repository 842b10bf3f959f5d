// What HERD_STAND_IN says of the stand-in for CUDA's driver: `name=value`, separated by commas; see driver.cpp.
#pragma once

#include <cstdlib>
#include <string>

namespace emulator {

// Empty if nothing is said.
inline std::string setting(const char* name) {
  const char* all = std::getenv("HERD_STAND_IN");
  const std::string list = std::string(",") + (all ? all : ""), key = std::string(",") + name + "=";
  const auto at = list.find(key);
  if (at == std::string::npos) return "";
  const auto start = at + key.size();
  return list.substr(start, list.find(',', start) - start);
}

inline unsigned long long setting(const char* name, unsigned long long otherwise) {
  const std::string value = setting(name);
  return value.empty() ? otherwise : std::strtoull(value.c_str(), nullptr, 10);
}

}  // namespace emulator
