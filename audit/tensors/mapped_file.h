// A read-only map of a whole file. Reading it may fail under the reader: guarded_read.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace moeaudit {

class MappedFile {
 public:
  MappedFile() = default;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  /// Maps `size` bytes of an open file.
  bool map(int fd, std::int64_t size);
  /// Opens and maps a regular file; false with why. An empty file is a map of 0 bytes.
  bool open(const std::string& path, std::string* why);
  const std::byte* data() const { return static_cast<const std::byte*>(data_); }
  std::int64_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  std::int64_t size_ = 0;
};

}  // namespace moeaudit
