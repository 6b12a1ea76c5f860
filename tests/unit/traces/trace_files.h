// Writes safetensors and .npy files byte by byte, for tests of the readers of traces.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace moeaudit::test {

template <class T>
std::string bytes_of(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

class SafetensorsText {
 public:
  template <class T>
  SafetensorsText& add(const std::string& name, const std::string& dtype, const std::vector<std::int64_t>& shape,
                       const std::vector<T>& values) {
    const std::string data = bytes_of(values);
    std::string extents;
    for (const std::int64_t n : shape) extents += (extents.empty() ? "" : ",") + std::to_string(n);
    header_ += (header_.empty() ? "{" : ",") + ("\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + extents + "]") +
               ",\"data_offsets\":[" + std::to_string(data_.size()) + "," + std::to_string(data_.size() + data.size()) + "]}";
    data_ += data;
    return *this;
  }
  std::string text() const {
    const std::string header = header_.empty() ? "{}" : header_ + "}";
    const std::uint64_t length = header.size();
    return std::string(reinterpret_cast<const char*>(&length), 8) + header + data_;
  }

 private:
  std::string header_, data_;
};

/// numpy.save, version 1.
template <class T>
std::string npy_text(const std::string& descr, const std::string& shape, const std::vector<T>& values, const char* order = "False") {
  std::string header = "{'descr': '" + descr + "', 'fortran_order': " + order + ", 'shape': " + shape + ", }";
  while ((header.size() + 11) % 64 != 0) header += ' ';
  header += '\n';
  std::string text("\x93NUMPY\x01\x00", 8);
  text += static_cast<char>(header.size() & 255);
  text += static_cast<char>(header.size() >> 8);
  return text + header + bytes_of(values);
}

}  // namespace moeaudit::test
