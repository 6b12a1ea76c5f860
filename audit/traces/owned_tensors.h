// Tensors that a reader of another format made, and the files it mapped, alive as long as the micro-batch.
#pragma once

#include <cstring>
#include <deque>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "audit/tensors/mapped_file.h"
#include "audit/tensors/tensor_store.h"

namespace moeaudit {

class OwnedTensors {
 public:
  /// A tensor with memory of its own.
  template <class T>
  TensorView own(std::string name, DType dtype, std::initializer_list<std::int64_t> shape, std::vector<T> values) {
    auto memory = std::make_shared<std::vector<T>>(std::move(values));
    owners_.push_back(memory);
    return view(std::move(name), dtype, shape,
                {reinterpret_cast<const std::byte*>(memory->data()), memory->size() * sizeof(T)});
  }

  /// A tensor in a file that keep() holds.
  TensorView map(std::string name, DType dtype, std::initializer_list<std::int64_t> shape, const MappedFile& file,
                 std::int64_t offset, std::int64_t bytes) {
    TensorView v = view(std::move(name), dtype, shape, {file.data() + offset, static_cast<std::size_t>(bytes)});
    v.file = 0;
    v.offset = offset;
    return v;
  }

  void keep(std::shared_ptr<const void> owner) { owners_.push_back(std::move(owner)); }

 private:
  TensorView view(std::string name, DType dtype, std::initializer_list<std::int64_t> shape,
                  std::span<const std::byte> bytes) {
    TensorView v;
    v.name = names_.emplace_back(std::move(name));
    v.dtype = dtype;
    v.dtype_text = name_of(dtype);
    v.shape = shapes_.emplace_back(shape);
    v.bytes = bytes;
    return v;
  }

  std::deque<std::string> names_;
  std::deque<std::vector<std::int64_t>> shapes_;
  std::vector<std::shared_ptr<const void>> owners_;
};

}  // namespace moeaudit
