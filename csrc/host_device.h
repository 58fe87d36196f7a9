// Marks what the compilers of both sides see: the host's and, where there is one, CUDA's.
#pragma once

#if defined(__CUDACC__)
#define VOID_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always, so that no copy of its own is left: this is compiled for several instruction sets, and the linker keeps one.
#define VOID_HOST_DEVICE inline __attribute__((always_inline))
#endif
