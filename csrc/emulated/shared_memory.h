// Shared memory: one arena per block, reached through checked pointers only.
//
// Beside every element lies a cell that remembers who wrote and read it last, when and where. It
// finds reads of what nobody wrote in this block, and races: two threads at one element, one of
// them writing, with neither a barrier nor an operation of their warp between them.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "emulated/scheduler.h"

namespace pyreid::emulated {

struct Access {
  uint32_t time;
  uint16_t thread : 15;
  uint16_t atomic : 1;
  uint16_t line;
  const char* file;
};

// Reads are kept as the last one, the last by another thread of its warp, and the last from
// another warp: enough to find a racing reader whoever writes. An atomic is a write and also one of
// these, because a later plain access races with each of them, not only with the last.
struct alignas(64) Cell {
  Access write;
  Access read, read_in_warp, read_elsewhere;
};

// What one PYREID_SHARED or PYREID_DYNAMIC_SHARED declares.
struct Region {
  const void* key;
  const char* name;
  Site site;
  unsigned char* data;
  Cell* cells;  // room for one per byte
  int64_t bytes;
  int64_t element;  // bytes, of the declared type
  int64_t granule;  // bytes that share a cell: what is accessed at once, at least
};

class Arena {
 public:
  static constexpr int64_t kStaticBytes = 48 * 1024;  // what CUDA allows without opting in
  static constexpr int64_t kBytes = 227 * 1024;       // what the largest devices have
  static constexpr int kMaxRegions = 64;

  // The region of `key`, declared now if this is its first use in the launch.
  Region* declare(const void* key, const char* name, int64_t bytes, int64_t element,
                  int64_t granule, bool dynamic, Site site) {
    if (launch_ != machine.launch_number() || era_ != machine.era()) start_launch();
    for (int i = 0; i < count_; ++i) {
      if (regions_[i].key == key) {
        refine(regions_[i], granule);
        return &regions_[i];
      }
    }
    if (!dynamic) static_bytes_ += bytes;
    const int64_t start = used_;
    used_ += (bytes + 15) / 16 * 16;
    if (static_bytes_ > kStaticBytes) {
      machine.fault(site, name, ": ", static_bytes_, " bytes of static shared memory, CUDA has ",
                    kStaticBytes);
    }
    if (used_ > kBytes || count_ == kMaxRegions) {
      machine.fault(site, name, ": ", used_, " bytes of shared memory in ", count_ + 1,
                    " arrays, the emulator has ", kBytes, " in ", kMaxRegions);
    }
    regions_[count_] = {key,   name,    site,   data_->data + start, cells_->data + start,
                        bytes, element, granule};
    return &regions_[count_++];
  }

  // Cells become smaller when an array is looked at as one of smaller elements.
  static void refine(Region& region, int64_t granule) {
    if (granule >= region.granule) return;
    const int64_t parts = region.granule / granule;
    for (int64_t i = region.bytes / granule - 1; i >= 0; --i) {
      region.cells[i] = region.cells[i / parts];
    }
    region.granule = granule;
  }

 private:
  // Zero pages that cost nothing until they are touched.
  template <class T>
  struct Pages {
    Pages() {
      void* memory = mmap(nullptr, sizeof(T) * kBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      data = static_cast<T*>(memory);
    }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    ~Pages() { munmap(data, sizeof(T) * kBytes); }
    T* data;
  };

  void start_launch() {
    if (data_ == nullptr) data_ = std::make_unique<Pages<unsigned char>>();
    // The cells need no clearing, as time does not go back, except when it did.
    if (cells_ == nullptr || era_ != machine.era()) cells_ = std::make_unique<Pages<Cell>>();
    launch_ = machine.launch_number();
    era_ = machine.era();
    count_ = 0;
    used_ = static_bytes_ = 0;
  }

  std::unique_ptr<Pages<unsigned char>> data_;
  std::unique_ptr<Pages<Cell>> cells_;
  Region regions_[kMaxRegions];
  int count_ = 0;
  int64_t used_ = 0;
  int64_t static_bytes_ = 0;
  uint64_t launch_ = 0;
  uint64_t era_ = 0;
};

inline Arena arena;

// One access of the running thread to `bytes` bytes at `offset`.
class Toucher {
 public:
  Toucher(Region* region, int64_t offset, int64_t bytes, int64_t alignment, Site site)
      : region_(region), offset_(offset), bytes_(bytes), site_(site) {
    if (offset < 0 || offset > region->bytes - bytes) {
      machine.fault(site, "out-of-range shared access: ", bytes, " bytes at ", place(),
                    ", which has ", region->bytes / region->element, " elements");
    }
    if (offset % alignment != 0) {
      machine.fault(site, "misaligned shared access: ", place(), " is not aligned to ", alignment,
                    " bytes");
    }
  }

  void read() {
    for_each_cell([&](Cell& cell) {
      check_written(cell);
      check(cell.write, "reads", " wrote");
      check_atomic(cell.read);
      check_atomic(cell.read_in_warp);
      check_atomic(cell.read_elsewhere);
      note(cell, false);
    });
  }

  void write() {
    for_each_cell([&](Cell& cell) {
      check(cell.write, "writes", " wrote");
      check(cell.read, "writes", " read");
      check(cell.read_in_warp, "writes", " read");
      check(cell.read_elsewhere, "writes", " read");
      cell.write = access(false);
    });
  }

  void update_atomically() {
    for_each_cell([&](Cell& cell) {
      check_written(cell);
      check_plain(cell.write, " wrote");
      check_plain(cell.read, " read");
      check_plain(cell.read_in_warp, " read");
      check_plain(cell.read_elsewhere, " read");
      cell.write = access(true);
      note(cell, true);
    });
  }

  unsigned char* data() const { return region_->data + offset_; }

 private:
  template <class Visit>
  void for_each_cell(Visit visit) {
    const int64_t last = (offset_ + bytes_ - 1) / region_->granule;
    for (int64_t i = offset_ / region_->granule; i <= last; ++i) visit(region_->cells[i]);
  }

  Access access(bool atomic) const {
    return {machine.now(), uint16_t(Machine::this_thread()), atomic,
            uint16_t(site_.line < 65535 ? site_.line : 65535), site_.file};
  }

  void note(Cell& cell, bool atomic) const {
    const Access now = access(atomic);
    if (cell.read.thread / kWarpSize != now.thread / kWarpSize) {
      const bool back = cell.read_elsewhere.thread / kWarpSize == now.thread / kWarpSize;
      cell.read_in_warp = back ? cell.read_elsewhere : Access{};
      cell.read_elsewhere = cell.read;
    } else if (cell.read.thread != now.thread) {
      cell.read_in_warp = cell.read;
    }
    cell.read = now;
  }

  void check_written(const Cell& cell) const {
    if (cell.write.time < machine.block_start()) {
      machine.fault(site_, "uninitialised shared read: nobody wrote ", place(), " in this block");
    }
  }

  void check(const Access& other, const char* now, const char* before) const {
    if (!machine.ordered(other.time, other.thread)) race(other, now, before);
  }

  void check_atomic(const Access& other) const {
    if (other.atomic) check(other, "reads", " wrote");
  }

  void check_plain(const Access& other, const char* before) const {
    if (!other.atomic) check(other, "atomically writes", before);
  }

  [[noreturn]] void race(const Access& other, const char* now, const char* before) const {
    machine.fault(site_, "shared race: ", now, " ", place(), ", which thread ", other.thread,
                  other.atomic ? " atomically wrote" : before, " at ", Site{other.file, other.line},
                  ", with no synchronisation between");
  }

  std::string place() const {
    const int64_t element = region_->element;
    const int64_t index = (offset_ < 0 ? offset_ - element + 1 : offset_) / element;
    std::ostringstream text;
    text << region_->name << "[" << index << "] (declared at " << region_->site << ")";
    return text.str();
  }

  Region* region_;
  int64_t offset_;
  int64_t bytes_;
  Site site_;
};

template <class T>
class SharedPointer;

// An element: reads where a T is wanted, writes where it is assigned to.
template <class T>
class SharedReference {
  using Value = std::remove_const_t<T>;

 public:
  SharedReference(Region* region, int64_t offset, Site site)
      : region_(region), offset_(offset), site_(site) {}
  SharedReference(const SharedReference&) = default;

  operator Value() const {
    Toucher toucher(region_, offset_, sizeof(T), alignof(T), site_);
    toucher.read();
    Value value;
    std::memcpy(static_cast<void*>(&value), toucher.data(), sizeof(T));
    return value;
  }

  const SharedReference& operator=(const Value& value) const {
    static_assert(!std::is_const_v<T>, "this shared memory is read-only");
    Toucher toucher(region_, offset_, sizeof(T), alignof(T), site_);
    toucher.write();
    std::memcpy(toucher.data(), static_cast<const void*>(&value), sizeof(T));
    return *this;
  }
  const SharedReference& operator=(const SharedReference& other) const {
    return *this = Value(other);
  }

#define PYREID_COMPOUND(op)                                   \
  template <class U>                                          \
  const SharedReference& operator op## = (const U& u) const { \
    return *this = static_cast<Value>(Value(*this) op u);     \
  }
  PYREID_COMPOUND(+)
  PYREID_COMPOUND(-)
  PYREID_COMPOUND(*)
  PYREID_COMPOUND(/)
  PYREID_COMPOUND(%)
  PYREID_COMPOUND(&)
  PYREID_COMPOUND(|)
  PYREID_COMPOUND(^)
  PYREID_COMPOUND(<<)
  PYREID_COMPOUND(>>)
#undef PYREID_COMPOUND

  const SharedReference& operator++() const { return *this += 1; }
  const SharedReference& operator--() const { return *this -= 1; }
  Value operator++(int) const {
    const Value old = *this;
    *this = Value(old + 1);
    return old;
  }
  Value operator--(int) const {
    const Value old = *this;
    *this = Value(old - 1);
    return old;
  }

  SharedPointer<T> operator&() const { return {region_, offset_, site_}; }

 private:
  Region* region_;
  int64_t offset_;
  Site site_;
};

// An index, with the place where it is used: an operator cannot take a default argument, but the
// conversion of its operand can.
struct Index {
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>>
  Index(I i, Site where = Site::here()) : value(int64_t(i)), site(where) {}
  template <class I>
  Index(const SharedReference<I>& i, Site where = Site::here())
      : value(int64_t(std::remove_const_t<I>(i))), site(where) {}
  int64_t value;
  Site site;
};

template <class T>
class SharedPointer {
 public:
  using Value = std::remove_const_t<T>;
  static_assert(std::is_trivially_copyable_v<Value>, "shared memory holds plain data");

  SharedPointer(Region* region, int64_t offset, Site site)
      : region_(region), offset_(offset), site_(site) {}
  operator SharedPointer<const T>() const { return {region_, offset_, site_}; }

  SharedReference<T> operator[](Index i) const {
    return {region_, offset_ + i.value * int64_t(sizeof(T)), i.site};
  }
  SharedReference<T> operator*() const { return {region_, offset_, site_}; }

  SharedPointer operator+(Index i) const {
    return {region_, offset_ + i.value * int64_t(sizeof(T)), i.site};
  }
  friend SharedPointer operator+(Index i, SharedPointer pointer) { return pointer + i; }
  SharedPointer operator-(Index i) const {
    return {region_, offset_ - i.value * int64_t(sizeof(T)), i.site};
  }
  int64_t operator-(const SharedPointer& other) const {
    return (offset_ - other.offset_) / int64_t(sizeof(T));
  }
  SharedPointer& operator+=(Index i) { return *this = *this + i; }
  SharedPointer& operator-=(Index i) { return *this = *this - i; }
  SharedPointer& operator++() {
    offset_ += sizeof(T);
    return *this;
  }

  bool operator==(const SharedPointer& other) const { return offset_ == other.offset_; }
  bool operator!=(const SharedPointer& other) const { return offset_ != other.offset_; }
  bool operator<(const SharedPointer& other) const { return offset_ < other.offset_; }

  // The same memory as elements of another type.
  template <class U>
  SharedPointer<U> cast() const {
    Arena::refine(*region_, granule<U>());
    return {region_, offset_, site_};
  }

  // The largest power of two that divides the size: no access is smaller, none straddles two.
  template <class U>
  static constexpr int64_t granule() {
    return int64_t(sizeof(U) & -sizeof(U)) < 16 ? int64_t(sizeof(U) & -sizeof(U)) : 16;
  }

  Toucher touch(int64_t bytes, int64_t alignment, Site site) const {
    return Toucher(region_, offset_, bytes, alignment, site);
  }

 private:
  Region* region_;
  int64_t offset_;
  Site site_;
};

template <class T>
SharedPointer<T> shared_array(const void* key, const char* name, int64_t count, bool dynamic,
                              Site site = Site::here()) {
  const int64_t bytes =
      dynamic ? int64_t(machine.dynamic_shared_bytes()) : count * int64_t(sizeof(T));
  const int64_t granule = SharedPointer<T>::template granule<T>();
  return {arena.declare(key, name, bytes, sizeof(T), granule, dynamic, site), 0, site};
}

// All of a launch's dynamic shared memory is one array.
inline char dynamic_shared_key;

// Loads and stores of `Object` where elements of T lie, at the alignment of Object.
template <class Object, class T>
Object load_as(const T* from, Site site) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(Object) != 0) {
    machine.fault(site, "misaligned load_pack of ", sizeof(Object), " bytes");
  }
  Object object;
  std::memcpy(static_cast<void*>(&object), from, sizeof(Object));
  return object;
}

template <class Object, class T>
void store_as(T* to, const Object& object, Site site) {
  if (reinterpret_cast<uintptr_t>(to) % alignof(Object) != 0) {
    machine.fault(site, "misaligned store_pack of ", sizeof(Object), " bytes");
  }
  std::memcpy(static_cast<void*>(to), &object, sizeof(Object));
}

template <class Object, class T>
Object load_as(const SharedPointer<T>& from, Site site) {
  Toucher toucher = from.touch(sizeof(Object), alignof(Object), site);
  toucher.read();
  Object object;
  std::memcpy(static_cast<void*>(&object), toucher.data(), sizeof(Object));
  return object;
}

template <class Object, class T>
void store_as(const SharedPointer<T>& to, const Object& object, Site site) {
  static_assert(!std::is_const_v<T>, "this shared memory is read-only");
  Toucher toucher = to.touch(sizeof(Object), alignof(Object), site);
  toucher.write();
  std::memcpy(toucher.data(), &object, sizeof(Object));
}

}  // namespace pyreid::emulated
