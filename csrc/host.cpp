// The pybind11 module void_ext._host: what this build is. No tensors, no torch, so it loads where the op library does
// not and can say why.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "build_info.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace {

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> out;
  for (std::string word; stream >> word;) out.push_back(word);
  return out;
}

py::dict build_info() {
  py::dict info;
  info["version"] = VOID_EXT_VERSION;
  info["torch_target"] = VOID_EXT_TORCH_TARGET;
  info["torch_built"] = VOID_EXT_TORCH_BUILT;
  info["compiler"] = VOID_EXT_COMPILER;
  info["cuda"] = static_cast<bool>(VOID_EXT_CUDA);
  info["cuda_version"] = VOID_EXT_CUDA_VERSION;
  info["cuda_arches"] = words(VOID_EXT_CUDA_ARCHES);
  info["cuda_reason"] = VOID_EXT_CUDA_REASON;
  info["cpu_isas"] = void_ext::cpu::compiled_isas();
  info["cpu_isa"] = void_ext::cpu::selected_isa();
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What this build of void_ext is.";
  m.def("build_info", &build_info,
        "The build's versions, toolchain, CUDA architectures and the CPU instruction set in use. ValueError where "
        "VOID_EXT_CPU_ISA names a set that this build or this CPU lacks.");
}
