// Asks for huge pages under a large new output: a first touch costs a page fault, and one every 4 KiB costs several
// times the add itself (4096 x 4096 float32, Zen 4: 22 ms of faults beside 6 ms of add). A hint: where the system does
// not take it, nothing changes. torch's own switch for this, THP_MEM_ALLOC_ENABLE, is off by default.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace void_ext::cpu {

inline void expect_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLarge = int64_t{16} << 20;
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (bytes < kLarge) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1);
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  // Whole pages within the output only: what lies beside it is somebody else's.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace void_ext::cpu
