// A text file line by line, in a fixed piece of memory, whatever its size.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace moeaudit {

class LineReader {
 public:
  static constexpr std::int64_t kMaxLine = std::int64_t{256} << 20;

  LineReader() = default;
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;
  ~LineReader();

  /// False with why: missing, no regular file, not readable.
  bool open(const std::string& path, std::string* why);
  /// The next line without its end; false at the end of the file, or with error() where it cannot be read.
  bool next(std::string_view* line);
  std::int64_t offset() const { return line_offset_; }  // of the line that next() gave
  int number() const { return number_; }                // of that line, from 1
  bool complete() const { return complete_; }           // it ended with a newline
  const std::string& error() const { return error_; }

  /// The bytes [offset, offset + length) of the file, for a line that was seen before.
  bool read_at(std::int64_t offset, std::int64_t length, std::string* out) const;

 private:
  bool fill();

  int fd_ = -1;
  std::string buffer_;
  std::size_t begin_ = 0;           // of what is not yet given, in buffer_
  std::int64_t buffer_offset_ = 0;  // of buffer_[0] in the file
  std::int64_t line_offset_ = 0;
  int number_ = 0;
  bool at_end_ = false, complete_ = false;
  std::string error_;
};

}  // namespace moeaudit
