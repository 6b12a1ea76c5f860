#include "audit/tensors/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace moeaudit {

MappedFile::~MappedFile() {
  if (data_) ::munmap(data_, static_cast<std::size_t>(size_));
}

bool MappedFile::map(int fd, std::int64_t size) {
  void* data = ::mmap(nullptr, static_cast<std::size_t>(size), PROT_READ, MAP_PRIVATE, fd, 0);
  if (data == MAP_FAILED) return false;
  data_ = data;
  size_ = size;
  return true;
}

bool MappedFile::open(const std::string& path, std::string* why) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a named pipe must not block
  struct stat info;
  bool ok = fd >= 0 && ::fstat(fd, &info) == 0;
  if (ok && !S_ISREG(info.st_mode)) {
    *why = "not a regular file";
    ok = false;
  } else {
    ok = ok && (info.st_size == 0 || map(fd, info.st_size));
    if (!ok) *why = std::strerror(errno);
  }
  if (fd >= 0) ::close(fd);
  return ok;
}

}  // namespace moeaudit
