// The pybind11 module void_ext._host: what this build is, and what Python asks for too often to go through an op. Not
// linked to torch, so it loads where the op library does not and can say why.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "build_info.h"
#include "positions.h"
#include "row_norms.h"
#include "tensor_view.h"

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
  m.doc() = "What this build of void_ext is, and what is asked for too often to be an op.";
  m.def("build_info", &build_info,
        "The build's versions, toolchain, CUDA architectures and the CPU instruction set in use. ValueError where "
        "VOID_EXT_CPU_ISA names a set that this build or this CPU lacks.");

  using void_ext::host::RowNorms;
  py::class_<RowNorms>(m, "RowNorms",
                       "RowNorms(table): L2 norms of a stream's rows, into columns of a float32 table [rows, columns].")
      .def(py::init<py::object>(), py::arg("table"))
      .def("write", &RowNorms::write, py::arg("stream"), py::arg("column"),
           "Norms of the rows of stream into a column; False, with nothing done, where row_l2norm has to do it.")
      .def("write_all", &RowNorms::write_all, py::arg("streams"),
           "Norms of several streams into columns 0, 1, ...; how many were written before one was for row_l2norm.");
  m.def("put_positions", &void_ext::host::put_positions, py::arg("table"), py::arg("start"), py::arg("end"),
        py::arg("value"), "table[:, start:end] = value; False, with nothing done, where torch has to do it.");
  m.def("tensors_visible", &void_ext::host::tensors_visible,
        "Whether this torch shows its tensors to RowNorms and put_positions.");
}
