#include "isa.h"
#include "row_kernels.h"

namespace void_ext::cpu {

const RowKernels& row_kernels() {
  static const RowKernels& chosen = []() -> const RowKernels& {
#ifdef VOID_EXT_X86
    if (selected_isa() == "avx512_bf16") return kAvx512Bf16;
    if (selected_isa() == "avx512") return kAvx512;
    if (selected_isa() == "avx2") return kAvx2;
#endif
    return kBaseline;
  }();
  return chosen;
}

}  // namespace void_ext::cpu
