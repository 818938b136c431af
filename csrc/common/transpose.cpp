#include "transpose.h"

#include "vec.h"

namespace pyzoo {

#define PZ_KERNEL "common/transpose_cpu.inc"
#include "common/foreach_isa.h"

template <class T>
void transpose_raw(const T* src, int64_t src_stride, T* dst, int64_t dst_stride, int64_t rows, int64_t columns, bool fetch) {
  PZ_FOR_ISA(transpose)(src, src_stride, dst, dst_stride, rows, columns, fetch);
}
template void transpose_raw(const Raw<2>*, int64_t, Raw<2>*, int64_t, int64_t, int64_t, bool);
template void transpose_raw(const Raw<4>*, int64_t, Raw<4>*, int64_t, int64_t, int64_t, bool);
template void transpose_raw(const Raw<8>*, int64_t, Raw<8>*, int64_t, int64_t, int64_t, bool);

}  // namespace pyzoo
