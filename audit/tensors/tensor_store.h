// The tensors of one model or adapter: an index over memory-mapped files. Nothing is read until a view is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "audit/facts/values.h"

namespace moeaudit {

/// A tensor as its header describes it, checked: data lies inside the file, bytes == product(shape) * size(dtype).
struct TensorView {
  std::string_view name;
  DType dtype = DType::kUnknown;
  std::string_view dtype_text;          // as written; for dtypes that cannot be decoded
  std::span<const std::int64_t> shape;  // row-major
  int file = -1;                        // index into TensorStore::files()
  std::int64_t offset = 0;              // byte offset of the data in that file
  std::span<const std::byte> bytes;     // memory-mapped, may be misaligned: read with memcpy

  std::int64_t elements() const;
};

/// Thread-safe for reading. Views stay valid as long as the store lives.
class TensorStore {
 public:
  TensorStore();
  ~TensorStore();
  TensorStore(TensorStore&&) noexcept;
  TensorStore& operator=(TensorStore&&) noexcept;

  /// Opens a safetensors file, a model.safetensors.index.json with its shards, or a folder holding either (or
  /// adapter_model.safetensors when `stem` is "adapter_model"). Faults are appended to `problems` with file and offset,
  /// and what is sound stays usable. A folder without weights gives an empty store and no problem.
  static TensorStore open(const std::string& path, std::string_view stem, std::vector<WeightProblem>* problems);

  bool empty() const;
  std::size_t size() const;
  const TensorView& operator[](std::size_t i) const;    // in order of file, then offset
  const TensorView* find(std::string_view name) const;  // nullptr if absent
  const std::vector<std::string>& files() const;        // paths as given
  /// Tensors that the index file names but no shard holds, with the shard it names.
  const std::vector<std::pair<std::string, std::string>>& missing_in_index() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Bytes of one element; 0 for packed 4- and 6-bit and unknown types.
int size_of(DType dtype);

/// Decodes `count` elements from `first` on to double, exactly. False if the dtype cannot be decoded.
bool decode(const TensorView& tensor, std::int64_t first, std::int64_t count, double* out);
bool decode(const TensorView& tensor, std::int64_t first, std::int64_t count,
            float* out);  // exact for <= 32-bit floats

}  // namespace moeaudit
