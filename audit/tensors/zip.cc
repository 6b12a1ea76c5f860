// PKWARE APPNOTE 6.3.10: end of central directory (4.3.16), its zip64 form (4.3.14, 4.3.15), central (4.3.12) and local
// (4.3.7) file headers. CRCs are not compared: torch can be told to write none (set_crc32_options).
#include "audit/tensors/zip.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace moeaudit {
namespace {

constexpr std::uint32_t kLocal = 0x04034b50, kCentral = 0x02014b50, kEnd = 0x06054b50, kEnd64 = 0x06064b50,
                        kLocator64 = 0x07064b50;
constexpr std::uint64_t kMaxEntries = 1'000'000;

/// Little-endian numbers at checked places; reading outside sets `bad` and gives 0.
struct Bytes {
  std::string_view all;
  bool bad = false;

  std::uint64_t number(std::uint64_t at, int size) {
    if (at > all.size() || all.size() - at < static_cast<std::uint64_t>(size)) {
      bad = true;
      return 0;
    }
    std::uint64_t value = 0;
    for (int i = size - 1; i >= 0; --i)
      value = value << 8 | static_cast<unsigned char>(all[at + static_cast<std::uint64_t>(i)]);
    return value;
  }
  std::string_view text(std::uint64_t at, std::uint64_t size) {
    if (at > all.size() || all.size() - at < size) {
      bad = true;
      return {};
    }
    return all.substr(at, size);
  }
};

struct Directory {
  std::uint64_t begin = 0, size = 0, entries = 0;
};

struct Entry {
  std::string_view name;
  std::uint64_t method = 0, flags = 0, packed = 0, size = 0, header = 0;
};

/// The end record lies behind everything but a comment of at most 65,535 bytes.
bool find_end(Bytes* in, std::uint64_t* at) {
  const std::uint64_t n = in->all.size();
  const std::uint64_t farthest = n < 22 + 65535 ? 0 : n - 22 - 65535;
  if (n < 22) return false;
  for (std::uint64_t i = n - 22;; --i) {
    if (in->number(i, 4) == kEnd && i + 22 + in->number(i + 20, 2) == n) {
      *at = i;
      return true;
    }
    if (i == farthest) return false;
  }
}

bool read_directory(Bytes* in, Directory* d, std::string* error) {
  std::uint64_t end = 0;
  if (!find_end(in, &end)) {
    *error = "the zip file has no end record: it is cut short or not a zip file";
    return false;
  }
  *d = {in->number(end + 16, 4), in->number(end + 12, 4), in->number(end + 10, 2)};
  std::uint64_t directory_end = end;
  if (end >= 20 && in->number(end - 20, 4) == kLocator64) {
    const std::uint64_t at = in->number(end - 20 + 8, 8);
    if (in->number(at, 4) != kEnd64 || in->bad) {
      *error = "the zip64 end record is not where its locator says";
      return false;
    }
    *d = {in->number(at + 48, 8), in->number(at + 40, 8), in->number(at + 32, 8)};
    directory_end = at;
  }
  if (in->bad || d->begin > directory_end || d->size > directory_end - d->begin || d->entries > kMaxEntries) {
    *error = "the zip directory does not lie inside the file";
    return false;
  }
  return true;
}

/// Sizes and offsets of 0xFFFFFFFF stand in the zip64 extra field, in the order size, packed, header.
void read_zip64_extra(Bytes* in, std::uint64_t at, std::uint64_t length, Entry* e) {
  const std::uint64_t end = at + length;
  while (!in->bad && end - at >= 4) {
    const std::uint64_t id = in->number(at, 2), size = in->number(at + 2, 2);
    at += 4;
    if (size > end - at) return;
    if (id == 1) {
      std::uint64_t place = at;
      for (std::uint64_t* field : {&e->size, &e->packed, &e->header}) {
        if (*field != 0xFFFFFFFFu) continue;
        if (place + 8 > at + size) return;
        *field = in->number(place, 8);
        place += 8;
      }
    }
    at += size;
  }
}

bool read_entries(Bytes* in, const Directory& d, std::vector<Entry>* entries, std::string* error) {
  std::uint64_t at = d.begin;
  for (std::uint64_t i = 0; i < d.entries; ++i) {
    Entry e;
    const bool signature = in->number(at, 4) == kCentral;
    e.flags = in->number(at + 8, 2);
    e.method = in->number(at + 10, 2);
    e.packed = in->number(at + 20, 4);
    e.size = in->number(at + 24, 4);
    e.header = in->number(at + 42, 4);
    const std::uint64_t name = in->number(at + 28, 2), extra = in->number(at + 30, 2), comment = in->number(at + 32, 2);
    e.name = in->text(at + 46, name);
    if (!in->bad) read_zip64_extra(in, at + 46 + name, extra, &e);
    at += 46 + name + extra + comment;
    if (in->bad || !signature || at > d.begin + d.size) {
      *error = "the zip directory is damaged at entry " + std::to_string(i);
      return false;
    }
    entries->push_back(e);
  }
  return true;
}

/// Where the data of an entry lies, after its local header; checked against the directory and the file.
bool entry_data(Bytes* in, const Directory& d, const Entry& e, std::uint64_t* begin, std::string* error) {
  const bool signature = in->number(e.header, 4) == kLocal;
  const std::uint64_t name = in->number(e.header + 26, 2), extra = in->number(e.header + 28, 2);
  const bool same_name = in->text(e.header + 30, name) == e.name;
  *begin = e.header + 30 + name + extra;
  if (in->bad || !signature || !same_name || *begin > d.begin || e.packed > d.begin - *begin) {
    *error = "the zip entry " + std::string(e.name) + " is not where the directory says";
    return false;
  }
  return true;
}

bool overlapping(std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges) {
  std::sort(ranges.begin(), ranges.end());
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return true;
  }
  return false;
}

}  // namespace

bool looks_like_zip(std::string_view bytes) {
  return bytes.starts_with("PK\x03\x04") || bytes.starts_with("PK\x05\x06");
}

bool find_zip_entry(std::string_view bytes, std::string_view name, std::string_view* entry, std::string* error) {
  Bytes in{bytes};
  Directory d;
  std::vector<Entry> entries;
  if (!read_directory(&in, &d, error) || !read_entries(&in, d, &entries, error)) return false;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges;
  const Entry* found = nullptr;
  std::uint64_t found_at = 0;
  for (const Entry& e : entries) {
    std::uint64_t begin = 0;
    if (!entry_data(&in, d, e, &begin, error)) return false;
    ranges.emplace_back(e.header, begin + e.packed);
    const bool in_folder =
        e.name.size() > name.size() && e.name.ends_with(name) && e.name[e.name.size() - name.size() - 1] == '/';
    if (e.name != name && !in_folder) continue;
    if (found) {
      *error = "the zip file holds " + std::string(found->name) + " and " + std::string(e.name) +
               ": which is meant is not clear";
      return false;
    }
    found = &e;
    found_at = begin;
  }
  if (overlapping(std::move(ranges))) {
    *error = "entries of the zip file overlap";
    return false;
  }
  if (!found) {
    *error = "the zip file holds no " + std::string(name);
    return false;
  }
  if (found->flags & 1) {
    *error = "the zip entry " + std::string(found->name) + " is encrypted";
    return false;
  }
  if (found->method != 0 || found->packed != found->size) {
    *error = "the zip entry " + std::string(found->name) + " is compressed (method " + std::to_string(found->method) +
             "); only stored entries are read, as torch.save and numpy.savez write them";
    return false;
  }
  *entry = bytes.substr(found_at, found->size);
  return true;
}

}  // namespace moeaudit
