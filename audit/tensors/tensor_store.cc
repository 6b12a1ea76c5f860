// Opens weight files: one safetensors file, the shards of an index, or a folder with either; maps them, checks the
// headers (safetensors.h) and indexes the tensors by name.
//
// A file that another process shortens while it is mapped gives SIGBUS when its data is touched: no reader of maps can
// prevent that. The header is therefore read, not mapped, and the size is taken by fstat after opening.
#include "audit/tensors/tensor_store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <limits>

#include "audit/tensors/huge_pages.h"
#include "audit/tensors/mapped_file.h"
#include "audit/tensors/name_index.h"
#include "audit/tensors/safetensors.h"
#include "audit/tensors/shard_index.h"
#include "audit/text/text.h"

namespace moeaudit {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMaxReported = 20;  // faults of one kind that are listed one by one

/// One open weight file. Never moved: names and shapes point into it.
struct WeightFile {
  MappedFile map;
  std::unique_ptr<char[]> header_text;
  SafetensorsHeader header;
};

/// Reads up to `size` bytes at `offset`; fewer only at the end of the file. -1 on an error.
std::int64_t read_at(int fd, std::int64_t offset, std::int64_t size, char* out) {
  std::int64_t done = 0;
  while (done < size) {
    const ssize_t n = ::pread(fd, out + done, static_cast<std::size_t>(size - done), static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return -1;
    if (n == 0) break;
    done += n;
  }
  return done;
}

/// A file descriptor that is closed at the end of the scope.
struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

bool read_header(int fd, std::int64_t size, WeightFile* file, std::vector<SafetensorsFault>* faults) {
  char start[32];
  const std::int64_t got = read_at(fd, 0, sizeof start, start);
  const std::int64_t length =
      got < 0 ? -1 : safetensors_header_length({start, static_cast<std::size_t>(got)}, size, faults);
  if (got >= 0 && length < 0) return false;
  const std::size_t bytes = static_cast<std::size_t>(std::max<std::int64_t>(length, 0));
  file->header_text = std::make_unique_for_overwrite<char[]>(bytes);
  char* const text = file->header_text.get();
  prefer_huge_pages(text, bytes);
  if (got < 0 || read_at(fd, 8, length, text) != length) {
    faults->push_back({0, "", std::string("its header cannot be read: ") + std::strerror(errno)});
    return false;
  }
  if (!file->map.map(fd, size)) {
    faults->push_back({-1, "", std::string("cannot be mapped into memory: ") + std::strerror(errno)});
    return false;
  }
  file->header = parse_safetensors_header({text, bytes}, size);
  *faults = std::move(file->header.faults);
  return true;
}

}  // namespace

struct TensorStore::Impl {
  std::vector<std::string> files;
  std::vector<std::unique_ptr<WeightFile>> open_files;  // aligned with files; null where it could not be opened
  std::vector<TensorView> views;
  std::vector<std::pair<std::string, std::string>> missing;
  NameIndex index;
  std::vector<WeightProblem>* problems = nullptr;  // only while opening

  void report(const std::string& file, std::int64_t offset, std::string_view tensor, std::string what) {
    problems->push_back({file, offset, std::string(tensor), std::move(what)});
  }
  void add_file(const std::string& path);
  bool open_file(const std::string& path, WeightFile* file);
  void open_index(const std::string& path);
  void open_folder(const fs::path& folder, std::string_view stem);
  void open_loose_shards(const fs::path& folder, std::string_view stem);
  void report_missing(const std::string& index_path, const ShardIndex& shards, const std::vector<int>& file_of);
  void build_index();
};

void TensorStore::Impl::add_file(const std::string& path) {
  auto file = std::make_unique<WeightFile>();
  const bool ok = open_file(path, file.get());
  const int number = static_cast<int>(files.size());
  files.push_back(path);
  open_files.push_back(nullptr);
  if (!ok) return;
  if (views.empty()) {  // what one file needs; more files grow it as they come
    views.reserve(file->header.tensors.size());
    prefer_huge_pages(views.data(), views.capacity() * sizeof(TensorView));
  }
  for (const SafetensorsTensor& t : file->header.tensors) {
    TensorView view;
    view.name = t.name;
    view.dtype = t.dtype;
    view.dtype_text = t.dtype_text;
    view.shape = file->header.shape(t);
    view.file = number;
    view.offset = t.begin;
    view.bytes = {file->map.data() + t.begin, static_cast<std::size_t>(t.end - t.begin)};
    views.push_back(view);
  }
  open_files.back() = std::move(file);
}

bool TensorStore::Impl::open_file(const std::string& path, WeightFile* file) {
  const Descriptor d{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};  // a named pipe must not block
  struct stat info;
  if (d.fd < 0 || ::fstat(d.fd, &info) != 0) {
    report(path, -1, "", std::strerror(errno));
    return false;
  }
  if (!S_ISREG(info.st_mode)) {
    report(path, -1, "", "not a regular file");
    return false;
  }
  std::vector<SafetensorsFault> faults;
  const bool ok = read_header(d.fd, info.st_size, file, &faults);
  for (SafetensorsFault& f : faults) report(path, f.offset, f.tensor, std::move(f.what));
  return ok;
}

void TensorStore::Impl::open_index(const std::string& path) {
  std::string text, error;
  if (!read_file(path, &text, &error)) {
    report(path, -1, "", error);
    return;
  }
  ShardIndex shards;
  std::int64_t offset = 0;
  std::string wrong;
  if (!parse_shard_index(text, &shards, &offset, &wrong)) {
    report(path, offset, "", wrong);
    return;
  }
  const fs::path folder = fs::path(path).parent_path();
  std::vector<int> file_of(shards.shards.size(), -1);
  for (std::size_t i = 0; i < shards.shards.size(); ++i) {
    const std::string& shard = shards.shards[i];
    if (!inside_folder(shard)) {
      report(path, -1, shards.first_tensor[i],
             "the index names the shard \"" + shard + "\", which is not a path inside its folder: not opened");
      continue;
    }
    const std::string full = (folder / shard).string();
    std::error_code ec;
    if (fs::exists(full, ec)) {
      file_of[i] = static_cast<int>(files.size());
      add_file(full);
    } else {
      report(full, -1, "", "the shard is missing; " + fs::path(path).filename().string() + " names it");
    }
  }
  build_index();
  report_missing(path, shards, file_of);
}

void TensorStore::Impl::report_missing(const std::string& index_path, const ShardIndex& shards,
                                       const std::vector<int>& file_of) {
  std::size_t wrong_shard = 0;
  for (const auto& [tensor, shard] : shards.weight_map) {
    const std::int64_t i = index.find(tensor);
    if (i < 0) {
      missing.emplace_back(tensor, shards.shards[shard]);
      continue;
    }
    const int file = views[static_cast<std::size_t>(i)].file;
    if (file == file_of[shard] || wrong_shard++ >= kMaxReported) continue;
    report(index_path, -1, tensor,
           "the index says it is in " + shards.shards[shard] + ", it is in " +
               fs::path(files[static_cast<std::size_t>(file)]).filename().string());
  }
}

void TensorStore::Impl::build_index() {
  const auto names = [this] {
    std::vector<std::string_view> n(views.size());
    std::transform(views.begin(), views.end(), n.begin(), [](const TensorView& v) { return v.name; });
    return n;
  };
  index.build(names());
  const auto duplicates = index.duplicates();
  if (duplicates.empty()) return;
  std::vector<char> drop(views.size());
  std::size_t reported = 0;
  for (const auto& [earlier, later] : duplicates) {
    drop[earlier] = 1;
    if (reported++ >= kMaxReported) continue;
    const TensorView &a = views[earlier], &b = views[later];
    const std::string where = a.file == b.file ? "byte " + std::to_string(a.offset) + " of the same file"
                                               : files[static_cast<std::size_t>(a.file)];
    report(files[static_cast<std::size_t>(b.file)], b.offset, b.name, "a tensor of this name is in " + where + ", too");
  }
  std::size_t kept = 0;
  for (std::size_t i = 0; i < views.size(); ++i) {
    if (!drop[i]) views[kept++] = views[i];
  }
  views.resize(kept);
  index.build(names());
}

void TensorStore::Impl::open_folder(const fs::path& folder, std::string_view stem) {
  const std::string single = (folder / (std::string(stem) + ".safetensors")).string();
  const std::string index_path = single + ".index.json";
  std::error_code ec;
  // from_pretrained takes the single file where both are there (transformers modeling_utils,
  // _get_resolved_checkpoint_files).
  if (fs::exists(fs::symlink_status(single, ec))) {
    add_file(single);
    build_index();
  } else if (fs::exists(fs::symlink_status(index_path, ec))) {
    open_index(index_path);
  } else {
    open_loose_shards(folder, stem);
  }
}

/// Shards without their index: what is there is read, and the missing index is a fault (no framework loads them so).
void TensorStore::Impl::open_loose_shards(const fs::path& folder, std::string_view stem) {
  std::vector<std::string> shards;
  std::error_code ec;
  for (fs::directory_iterator it(folder, ec), end; !ec && it != end; it.increment(ec)) {
    const std::string name = it->path().filename().string();
    const std::string_view rest = std::string_view(name).substr(std::min(stem.size(), name.size()));
    const bool numbered = name.starts_with(stem) &&
                          rest.size() == std::string_view("-00001-of-00002.safetensors").size() &&
                          rest.substr(6, 4) == "-of-" && rest.ends_with(".safetensors");
    if (numbered) shards.push_back(it->path().string());
  }
  if (shards.empty()) return;
  std::sort(shards.begin(), shards.end());
  report(folder.string(), -1, "",
         "holds " + std::to_string(shards.size()) + " shards but no " + std::string(stem) +
             ".safetensors.index.json, which names what each of them holds");
  for (const std::string& shard : shards) add_file(shard);
  build_index();
}

TensorStore::TensorStore() : impl_(std::make_unique<Impl>()) {}
TensorStore::~TensorStore() = default;
TensorStore::TensorStore(TensorStore&& other) noexcept = default;
TensorStore& TensorStore::operator=(TensorStore&& other) noexcept = default;

TensorStore TensorStore::open(const std::string& path, std::string_view stem, std::vector<WeightProblem>* problems) {
  TensorStore store;
  std::vector<WeightProblem> unused;
  Impl& impl = *store.impl_;
  impl.problems = problems ? problems : &unused;
  std::error_code ec;
  const fs::file_status status = fs::status(path, ec);
  if (fs::is_directory(status)) {
    impl.open_folder(path, stem.empty() ? "model" : stem);
  } else if (path.ends_with(".json")) {
    impl.open_index(path);
  } else {
    impl.add_file(path);
    impl.build_index();
  }
  impl.problems = nullptr;
  return store;
}

bool TensorStore::empty() const { return size() == 0; }
std::size_t TensorStore::size() const { return impl_ ? impl_->views.size() : 0; }
const TensorView& TensorStore::operator[](std::size_t i) const { return impl_->views[i]; }

const TensorView* TensorStore::find(std::string_view name) const {
  const std::int64_t i = impl_ ? impl_->index.find(name) : -1;
  return i < 0 ? nullptr : &impl_->views[static_cast<std::size_t>(i)];
}

const std::vector<std::string>& TensorStore::files() const {
  static const std::vector<std::string> none;
  return impl_ ? impl_->files : none;
}

const std::vector<std::pair<std::string, std::string>>& TensorStore::missing_in_index() const {
  static const std::vector<std::pair<std::string, std::string>> none;
  return impl_ ? impl_->missing : none;
}

std::int64_t TensorView::elements() const {
  std::int64_t n = 1;
  for (const std::int64_t extent : shape) {
    // Only a dtype that the format does not know has an unchecked size; its count of elements is of no use, but
    // defined.
    if (__builtin_mul_overflow(n, extent, &n)) return std::numeric_limits<std::int64_t>::max();
  }
  return n;
}

}  // namespace moeaudit
