#include "kernels/backend.h"

#ifdef MOE_AUDIT_HAVE_CUDA
#include "kernels/cuda/backend.h"
#endif

namespace moeaudit::kernels {

std::unique_ptr<Backend> open_cuda(std::string* why_not) {
#ifdef MOE_AUDIT_HAVE_CUDA
  return cuda::open_backend(why_not);
#else
  *why_not = "this moe-audit was built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)";
  return nullptr;
#endif
}

}  // namespace moeaudit::kernels
