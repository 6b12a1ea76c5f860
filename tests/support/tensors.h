// LibTorch tensors from the vectors of a test, and back.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

namespace moeaudit::test {

/// Of the vector's own type; it owns its values.
template <class T>
at::Tensor tensor(const std::vector<T>& v, std::vector<std::int64_t> shape) {
  return at::from_blob(const_cast<T*>(v.data()), shape, c10::CppTypeToScalarType<T>::value).clone();
}
inline std::vector<double> values(const at::Tensor& t) {
  const at::Tensor c = t.detach().to(at::kDouble).contiguous();
  return {c.data_ptr<double>(), c.data_ptr<double>() + c.numel()};
}

}  // namespace moeaudit::test
