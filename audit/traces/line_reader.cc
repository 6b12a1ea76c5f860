#include "audit/traces/line_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace moeaudit {
namespace {

constexpr std::size_t kPiece = std::size_t{1} << 18;

}  // namespace

LineReader::~LineReader() {
  if (fd_ >= 0) ::close(fd_);
}

bool LineReader::open(const std::string& path, std::string* why) {
  fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a named pipe must not block
  struct stat info;
  if (fd_ < 0 || ::fstat(fd_, &info) != 0) {
    *why = std::strerror(errno);
    return false;
  }
  if (S_ISREG(info.st_mode)) return true;
  *why = "not a regular file";
  return false;
}

bool LineReader::fill() {
  if (begin_ > 0) {
    buffer_.erase(0, begin_);
    buffer_offset_ += static_cast<std::int64_t>(begin_);
    begin_ = 0;
  }
  const std::size_t had = buffer_.size();
  buffer_.resize(had + kPiece);
  ssize_t n;
  do {
    n = ::read(fd_, buffer_.data() + had, kPiece);
  } while (n < 0 && errno == EINTR);
  if (n < 0) error_ = std::strerror(errno);
  buffer_.resize(had + static_cast<std::size_t>(n < 0 ? 0 : n));
  at_end_ = n <= 0;
  return n > 0;
}

bool LineReader::next(std::string_view* line) {
  if (number_ == 0 && begin_ == 0 && buffer_.empty() && fill() && buffer_.starts_with("\xEF\xBB\xBF")) begin_ = 3;
  std::size_t searched = begin_;
  for (;;) {
    const std::size_t end = buffer_.find('\n', searched);
    if (end != std::string::npos) {
      *line = std::string_view(buffer_).substr(begin_, end - begin_);
      line_offset_ = buffer_offset_ + static_cast<std::int64_t>(begin_);
      begin_ = end + 1;
      complete_ = true;
      ++number_;
      return true;
    }
    if (static_cast<std::int64_t>(buffer_.size() - begin_) > kMaxLine) {
      error_ = "line " + std::to_string(number_ + 1) + " is longer than 256 MiB";
      return false;
    }
    const std::size_t pending = buffer_.size() - begin_;
    if (!at_end_ && fill()) {
      searched = begin_ + pending;
      continue;
    }
    if (!error_.empty() || begin_ == buffer_.size()) return false;
    *line = std::string_view(buffer_).substr(begin_);
    line_offset_ = buffer_offset_ + static_cast<std::int64_t>(begin_);
    begin_ = buffer_.size();
    complete_ = false;
    ++number_;
    return true;
  }
}

bool LineReader::read_at(std::int64_t offset, std::int64_t length, std::string* out) const {
  out->resize(static_cast<std::size_t>(length));
  std::int64_t done = 0;
  while (done < length) {
    const ssize_t n = ::pread(fd_, out->data() + done, static_cast<std::size_t>(length - done), offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    done += n;
  }
  return true;
}

}  // namespace moeaudit
