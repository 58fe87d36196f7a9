#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace void_ext::cpu {

namespace {

bool supported(const std::string& isa) {
#ifdef VOID_EXT_X86
  // These ask the operating system too: whether it saves the wider registers.
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (isa == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (isa == "avx512_bf16") return supported("avx512") && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == "baseline";
}

std::string listed(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

std::string select() {
  std::vector<std::string> usable;
  for (const std::string& isa : compiled_isas()) {
    if (supported(isa)) usable.push_back(isa);
  }
  const char* wanted = std::getenv("VOID_EXT_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return usable.back();
  for (const std::string& isa : usable) {
    if (isa == wanted) return isa;
  }
  throw std::invalid_argument("VOID_EXT_CPU_ISA: expected one of " + listed(usable) + " on this CPU (this build has " +
                              listed(compiled_isas()) + "), got '" + wanted + "'");
}

}  // namespace

std::vector<std::string> compiled_isas() {
#ifdef VOID_EXT_X86
  return {"baseline", "avx2", "avx512", "avx512_bf16"};
#else
  return {"baseline"};
#endif
}

const std::string& selected_isa() {
  static const std::string isa = select();
  return isa;
}

}  // namespace void_ext::cpu
