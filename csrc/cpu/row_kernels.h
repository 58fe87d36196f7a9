// The row kernels of one instruction set, and the tables this build holds. Rows [begin, end) of a call.
#pragma once

#include <cstdint>

#include "../args.h"

namespace void_ext::cpu {

struct RowKernels {
  void (*add_l2norm)(const AddL2NormArgs&, int64_t begin, int64_t end);
  void (*add_rms_norm)(const AddRmsNormArgs&, int64_t begin, int64_t end);
  void (*row_l2norm)(const RowL2NormArgs&, int64_t begin, int64_t end);
  void (*keep_rows)(const KeepRowsArgs&, int64_t begin, int64_t end);
};

// Elements that are worth a thread, by torch's own measure: a decode step's few rows stay on the caller's.
constexpr int64_t kOneThread = 32768;

// Those of selected_isa().
const RowKernels& row_kernels();

extern const RowKernels kBaseline;
#ifdef VOID_EXT_X86
extern const RowKernels kAvx2;
extern const RowKernels kAvx512;
extern const RowKernels kAvx512Bf16;
#endif

}  // namespace void_ext::cpu
