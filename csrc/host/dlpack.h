// The part of DLPack 1.x that is needed to look at a Python tensor without torch's headers: its C exchange table, which
// a tensor type publishes as `__dlpack_c_exchange_api__`. Layouts as in https://github.com/dmlc/dlpack (dlpack.h);
// a major version other than 1 may have others.
#pragma once

#include <cstdint>

namespace void_ext::dlpack {

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;                                      // DLDeviceType
constexpr uint8_t kInt = 0, kFloat = 2, kBFloat = 4, kBool = 6;  // DLDataTypeCode
constexpr const char* kCapsule = "dlpack_exchange_api";

struct Tensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;  // of elements; null: compact, the last dimension fastest
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  ExchangeApi* previous;
  void* allocate;
  void* owned_from_object;
  void* object_from_owned;
  int (*view_of_object)(void* object, Tensor* out);  // null where the type has none; -1 and a Python error: no view
  void* current_stream;
};

}  // namespace void_ext::dlpack
