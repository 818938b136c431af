// The part of the DLPack ABI (https://dmlc.github.io/dlpack, version 1.3) that we read. Declared here so that building needs
// no third-party header; tests/test_build.py holds every size and offset against the copy that torch ships.
#pragma once

#include <cstdint>

namespace pyzoo::dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t device_type, device_id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: row-major
  uint64_t byte_offset;
};

struct ManagedTensor {  // capsule "dltensor"
  DLTensor tensor;
  void* manager_ctx;
  void (*deleter)(ManagedTensor*);
};

struct ManagedTensorVersioned {  // capsule "dltensor_versioned"
  Version version;
  void* manager_ctx;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  DLTensor tensor;
};

struct ExchangeAPIHeader {
  Version version;
  ExchangeAPIHeader* prev_api;
};

struct ExchangeAPI {  // capsule "dlpack_exchange_api", found as type(x).__dlpack_c_exchange_api__
  ExchangeAPIHeader header;
  int (*managed_tensor_allocator)(DLTensor*, ManagedTensorVersioned**, void*, void (*)(void*, const char*, const char*));
  int (*managed_tensor_from_py_object_no_sync)(void*, ManagedTensorVersioned**);
  int (*managed_tensor_to_py_object_no_sync)(ManagedTensorVersioned*, void**);
  int (*dltensor_from_py_object_no_sync)(void*, DLTensor*);  // borrowed view; sets a Python error on failure
  int (*current_work_stream)(int32_t, int32_t, void**);
};

}  // namespace pyzoo::dlpack
