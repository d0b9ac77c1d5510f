// Memory of the calls: for scratch, and for numbers that are converted to float.
#pragma once

#include <cstddef>

namespace fusedrnn {

// Frees what this thread keeps for its next calls.
void release_memory();

// Asks for large pages in [data, data + bytes), as far as whole ones fit; only advice.
void advise_large_pages(void* data, size_t bytes);

// Not cleared, on the boundary of a cache line; where it is large, of a large page. What is given back
// a thread keeps for its next calls, up to 256 MB.
class Memory {
 public:
  Memory();
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;

  void* data() const;  // null if there was none

 private:
  void* data_  = nullptr;
  size_t size_ = 0;
};

}  // namespace fusedrnn
