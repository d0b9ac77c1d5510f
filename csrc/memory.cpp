#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedrnn {
namespace {

constexpr size_t kLargePage = size_t(2) << 20;

// The blocks that a thread gave back last, up to kMost bytes of them: pages from the system would
// have to be cleared. Training takes 0.9 of the time so for an LSTM at (32, 100, 256) in bfloat16,
// 0.6 for an LSTMCell at (32, 256); in float32, with 256 MB kept instead of 64, 0.84 for an LSTM at
// (64, 50, 1024) and 0.65 at (128, 100, 512), in turns with torch.nn's calls on a virtual machine
// whose host takes freed pages away.
class Kept {
 public:
  // A block of at least so many bytes, and not of many more; null if there is none.
  void* take(size_t bytes, size_t* size) {
    for (Block& block : blocks_) {
      if (block.size < bytes || block.size > 2 * bytes) continue;
      *size   = block.size;
      total_ -= block.size;
      return std::exchange(block, {}).data;
    }
    return nullptr;
  }
  void give(void* data, size_t size) {
    if (size < kSmallest || size > kMost) return std::free(data);
    // In the place of the oldest ones.
    for (drop(next_); total_ + size > kMost; drop(next_)) next_ = (next_ + 1) % kBlocks;
    blocks_[next_]  = {data, size};
    next_           = (next_ + 1) % kBlocks;
    total_         += size;
  }
  void drop_all() {
    for (int i = 0; i < kBlocks; ++i) drop(i);
  }
  ~Kept() { drop_all(); }

 private:
#if defined(__SANITIZE_ADDRESS__)  // so that it sees uses after free
  static constexpr size_t kMost = 0;
#else
  static constexpr size_t kMost = 256 << 20;
#endif
  static constexpr size_t kSmallest = 64 << 10;  // malloc keeps smaller ones
  static constexpr int kBlocks      = 16;
  struct Block {
    void* data  = nullptr;
    size_t size = 0;
  };

  void drop(int i) {
    total_ -= blocks_[i].size;
    std::free(std::exchange(blocks_[i], {}).data);
  }

  Block blocks_[kBlocks];
  int next_     = 0;  // the oldest, or an empty place
  size_t total_ = 0;
};

thread_local Kept kept;

}  // namespace

void release_memory() { kept.drop_all(); }

// The first touch of small pages costs a fault for every 4 KB: for 64 MB, 25 ms on the virtual
// machine where 2 MB pages take 5 (and freeing 4 where it takes 0.2).
void advise_large_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < 2 * kLargePage) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const size_t skip  = (kLargePage - address % kLargePage) % kLargePage;
  const size_t whole = (bytes - skip) / kLargePage * kLargePage;
  madvise(static_cast<char*>(data) + skip, whole, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

Memory::Memory() = default;
Memory::Memory(size_t bytes) {
  data_ = kept.take(bytes, &size_);
  if (data_) return;
  size_ = bytes;
  if (posix_memalign(&data_, bytes < 2 * kLargePage ? 64 : kLargePage, bytes) != 0) data_ = nullptr;
  if (data_) advise_large_pages(data_, bytes);
}
Memory::~Memory() {
  if (data_) kept.give(data_, size_);
}
Memory::Memory(Memory&& other) noexcept { *this = std::move(other); }
Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}
void* Memory::data() const { return data_; }

}  // namespace fusedrnn
