// Which instruction set's row kernels run: the best one both compiled in and present, or the one that the environment
// variable VOID_EXT_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

namespace void_ext::cpu {

// The names of the sets this build holds, slowest first.
std::vector<std::string> compiled_isas();

// The name of the set in use. Throws std::invalid_argument where VOID_EXT_CPU_ISA names none of compiled_isas(), or one
// that this CPU lacks. The environment is read once.
const std::string& selected_isa();

}  // namespace void_ext::cpu
