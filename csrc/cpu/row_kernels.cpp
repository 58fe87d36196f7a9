// The row kernels, compiled once per instruction set: CMakeLists.txt gives VOID_EXT_CPU_TABLE, the name of this
// compilation's table, and the flags. Nothing has external linkage but the table, and nothing comes from the standard
// library that could leave an inline copy: the linker might keep the one compiled for the widest set.
#include "row_kernels.h"

#include "add_l2norm.h"
#include "add_rms_norm.h"
#include "keep_rows.h"
#include "row_l2norm.h"

namespace void_ext::cpu {

const RowKernels VOID_EXT_CPU_TABLE = {add_l2norm, add_rms_norm, row_l2norm, keep_rows};

}  // namespace void_ext::cpu
