// The emulated device: fibers and their scheduler, the clocks that say what is ordered, the checks
// of every access, and launches. Reading order is the file's. What it promises is in emulation.h.
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include <cuda/ptx.cuh>

#include "emulation.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr int kLanes         = 32;
constexpr int kBarriers      = 32;  // at most, in a CTA's shared memory
constexpr int kGranule       = 2;   // bytes that share a record of their accesses
constexpr int kGlobalReaders = 4;   // records kept of a granule; of shared memory, all
constexpr size_t kQueue      = 4;   // launches
// A stack, and a little, so that the stacks' tops do not all fall on the same lines of a cache.
constexpr size_t kStackBytes = 64 * 1024 + 13 * 64;
constexpr uint64_t kCanary   = 0x5ca1ab1e0ddba11;

// ---- Settings and the error

struct Device {
  int count = 1, major = 9, minor = 0, multiprocessors = 132, shared_bytes = 227 * 1024;
} device;
double switch_probability = 0.02;
int ctas_in_flight        = 4;  // more fall out of the L2 cache
uint64_t switch_limit     = 200000000;
bool collectives_order    = false;

std::recursive_mutex api;  // one OS thread at a time
std::string error;
cudaError_t last_error = cudaSuccess;
uint64_t seed          = 1;

uint64_t random_state = 1;
void random_restart() { random_state = (seed + 1) * 0x9e3779b97f4a7c15 | 1; }
uint64_t random_bits() {  // xorshift
  random_state        ^= random_state << 13;
  random_state        ^= random_state >> 7;
  return random_state ^= random_state << 17;
}
size_t random_below(size_t n) { return size_t((unsigned __int128)(random_bits()) * n >> 64); }
bool happens(double probability) { return double(random_bits() >> 11) * 0x1p-53 < probability; }

std::string format(const char* text, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  return buffer;
}

// ---- What is ordered: vector clocks, in blocks of a CTA so that equal parts are shared.

template <class T>
class Ref {
 public:
  Ref(T* p = nullptr) : p_(p) {
    if (p_) ++p_->references;
  }
  Ref(const Ref& other) : Ref(other.p_) {}
  Ref& operator=(Ref other) {
    std::swap(p_, other.p_);
    return *this;
  }
  ~Ref() {
    if (p_ && --p_->references == 0) delete p_;
  }
  T* operator->() const { return p_; }
  T& operator*() const { return *p_; }
  T* get() const { return p_; }
  explicit operator bool() const { return p_; }
  bool operator==(const Ref& other) const { return p_ == other.p_; }
  bool operator!=(const Ref& other) const { return p_ != other.p_; }

 private:
  T* p_;
};

// Of a CTA's threads, and behind them its barriers: up to which of their accesses one is behind.
struct Block {
  int references = 0;
  std::vector<uint32_t> clock;
  explicit Block(size_t n) : clock(n) {}
  Block(const Block& other) : clock(other.clock) {}
};

// The same of all CTAs of a launch; and what is known of the launches before.
struct Knowledge {
  int references        = 0;
  uint32_t known_before = 0;  // all CTAs with smaller numbers
  bool knows_previous   = false;
  std::vector<Ref<Block>> ctas;
  explicit Knowledge(size_t n) : ctas(n) {}
  Knowledge(const Knowledge& other)
      : known_before(other.known_before), knows_previous(other.knows_previous), ctas(other.ctas) {}
};

void merge(Ref<Block>& into, const Ref<Block>& from) {
  if (!from || into == from) return;
  bool below = true, above = true;
  if (into) {
    for (size_t i = 0; i < from->clock.size(); ++i) {
      below &= into->clock[i] <= from->clock[i];
      above &= into->clock[i] >= from->clock[i];
    }
    if (above) return;
  }
  if (below) {
    into = from;
    return;
  }
  into = new Block(*into);
  for (size_t i = 0; i < from->clock.size(); ++i) {
    into->clock[i] = std::max(into->clock[i], from->clock[i]);
  }
}

void merge(Ref<Knowledge>& into, const Ref<Knowledge>& from) {
  if (!from || into == from) return;
  if (!into) {
    into = from;
    return;
  }
  Ref<Knowledge> merged   = new Knowledge(*into);
  merged->known_before    = std::max(into->known_before, from->known_before);
  merged->knows_previous |= from->knows_previous;
  for (size_t i = 0; i < merged->ctas.size(); ++i) merge(merged->ctas[i], from->ctas[i]);
  const bool same = merged->ctas == from->ctas && merged->known_before == from->known_before &&
                    merged->knows_previous == from->knows_previous;
  into            = same ? from : merged;
}

// ---- The actors

struct Thread;
struct Cta;

struct Launch {
  std::function<void()> body;
  const void* kernel;
  dim3 grid, block, cluster;
  size_t shared_bytes;
  bool programmatic, cooperative;
  cudaStream_t stream;
  int serial, num_ctas, group_size;
  uint32_t first;                          // its CTAs' numbers, which no other launch has
  uint32_t base;                           // CTAs below are known to have ended before it began
  uint32_t known_at_trigger = UINT32_MAX;  // the same, by all its CTAs when they let the next start
  std::shared_ptr<Launch> previous;        // that may still run
  uint32_t known_at_end = 0;
  bool any_waited = false, ended = false;
  std::vector<int> order;  // of groups, from the back
  int ctas_running = 0, ctas_ended = 0, ctas_triggered = 0;
  std::vector<Thread*> waiting;  // the next launch's, for this one's end
};

// What one is behind: a thread, or a store under way.
struct View {
  Launch* launch = nullptr;
  uint32_t cta   = 0;
  int self       = 0;  // in the CTA; -1: none of its threads
  Ref<Block> local;
  Ref<Knowledge> remote;
  uint32_t known_before = 0;
  bool knows_previous   = false;
};

struct Copy {
  unsigned char* shared;
  const unsigned char* global;
  int group;
  Site site;
};

struct Thread : View {
  jmp_buf context;
  ucontext_t start;
  unsigned char* stack = nullptr;
  bool fresh           = true;  // its fiber does not run yet
  uint3 index;
  Cta* home;
  int lane;
  uint32_t clock;  // of its accesses now
  bool dirty;      // there has been one
  const char* op;  // what it waits at, or null
  Site site;
  void* argument;  // to a collective
  std::vector<Copy> copies;
  int copy_group;
  bool in_cluster_barrier;
  uint32_t cluster_phase;
  const uint32_t* spin_address;
  uint32_t spin_value;
};

struct Warp {
  std::vector<Thread*> lanes;
  int alive = 0, arrived = 0;
  const char* op = nullptr;
  Site site{};
};

struct Mbarrier {
  int count, pending;
  int64_t bytes  = 0;
  uint32_t phase = 0;
  bool fenced    = false;
  int thread;  // that has made it, and when
  uint32_t clock;
  int slot;             // in a Block
  uint32_t landed = 0;  // stores
  Ref<Knowledge> gathering, ended;
  struct Arrival {
    uint32_t cta;
    int thread;
    uint32_t clock;
  };
  std::vector<Arrival> remote;
  std::vector<Thread*> waiting;
};

// Sites as numbers, small enough for the records below: places in a hash table.
constexpr size_t kSites = 1 << 14;
Site site_table[kSites];
uint16_t number_of(Site site) {
  size_t i = (reinterpret_cast<uintptr_t>(site.file) * 31 + size_t(site.line) * 0x9e37) % kSites;
  while (site_table[i].file &&
         (site_table[i].file != site.file || site_table[i].line != site.line)) {
    i = (i + 1) % kSites;
  }
  site_table[i] = site;
  return uint16_t(i);
}

// A word's record: who wrote it last, and a list of who has read it since.
struct Cell {
  uint32_t cta, clock, readers;  // cta 0: not written
  uint16_t thread : 12;
  uint16_t flags : 4;
  uint16_t site;
};
enum CellFlags { kPending = 1, kAtomicWrite = 2, kIsBarrier = 4 };

struct Reader {
  uint32_t cta, clock, lanes, next;
  uint16_t warp : 8;
  uint16_t access : 8;
  uint16_t site;
};

struct Cluster {
  int alive = 0, arrived = 0;
  uint32_t phase = 0;
  Ref<Knowledge> gathering, ended;
  std::vector<Thread*> waiting;
};

struct Group;

struct Cta {
  Group* group;
  Launch* launch;
  Cluster* cluster;
  int rank;  // in the cluster
  uint32_t number;
  uint3 index;
  unsigned char* shared;
  std::vector<Cell> cells;  // of the shared memory
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  int alive = 0, arrived = 0;
  Site barrier_site{};
  std::map<uint32_t, Mbarrier> barriers;  // by offset
  bool triggered = false;
  View at_end;  // what its threads knew when they ended
};

// CTAs that must run together: a cluster, a cooperative grid, or one.
struct Group {
  std::shared_ptr<Launch> launch;
  std::vector<Cta> ctas;
  std::vector<Cluster> clusters;
  int alive = 0, arrived = 0;  // threads; at the grid's barrier
};

struct StoreUnderWay {
  View view;  // of the issuer, when it was issued
  Cta* target;
  uint32_t offset, value, barrier;
  Site site;
};

std::deque<std::shared_ptr<Launch>> queue;
std::vector<std::unique_ptr<Group>> groups;
std::vector<Thread*> ready, idle;
std::vector<StoreUnderWay> stores;
Thread* current = nullptr;
jmp_buf main_context;
bool to_main           = false;  // something for the main loop to do
bool failed            = false;
uint64_t switches      = 0;
uint64_t first_switch  = 0;  // of this run
uint64_t progress      = 0;  // the last switch at which something other than spinning happened
int launches           = 0;
uint64_t launched_ctas = 0;
uint32_t next_number   = 1;  // of a CTA

// ---- Errors

std::string name_of(const Launch& launch) {
  Dl_info info;
  if (!dladdr(launch.kernel, &info) || info.dli_saddr != launch.kernel || !info.dli_sname) {
    const dim3 g = launch.grid, b = launch.block;
    return format("kernel %d (%u x %u x %u blocks of %u x %u x %u threads)", launch.serial, g.x,
                  g.y, g.z, b.x, b.y, b.z);
  }
  int status         = 0;
  char* const plain  = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string result = status == 0 ? plain : info.dli_sname;
  std::free(plain);
  return result.substr(0, result.find('(', 1)) + format(" (kernel %d)", launch.serial);
}

std::string name_of(const Cta& cta) {
  return format("block (%u, %u, %u)", cta.index.x, cta.index.y, cta.index.z);
}

std::string name_of(const Thread& t) {
  return format("thread (%u, %u, %u) of ", t.index.x, t.index.y, t.index.z) + name_of(*t.home) +
         " of " + name_of(*t.launch);
}

std::string name_of(Site site) { return format("%s:%d", site.file, site.line); }

// Gives up all that runs: the main loop sees to it.
[[noreturn]] void fail(const std::string& message) {
  if (!failed) error = message + format(" [seed %llu]", (unsigned long long)(seed));
  failed = true;
  _longjmp(main_context, 1);
}

[[noreturn]] void fail_at(const char* op, Site site, const std::string& message) {
  fail(std::string(op) + " at " + name_of(site) + " by " + name_of(*current) + ": " + message);
}

// Where everyone waits, one line for each place and CTA.
std::string who_waits() {
  std::map<std::string, int> places;
  for (const auto& group : groups) {
    for (const Cta& cta : group->ctas) {
      for (const Thread* t : cta.threads) {
        if (!t || !t->op) continue;
        ++places["at " + std::string(t->op) + " " + name_of(t->site) + " in " + name_of(cta) +
                 " of " + name_of(*cta.launch)];
      }
    }
  }
  std::string result;
  int lines = 0;
  for (const auto& place : places) {
    if (++lines > 12) return result + "\n  and others";
    result += format("\n  %d threads ", place.second) + place.first;
  }
  return result;
}

// ---- Fibers

void end_thread();

void fiber_main() {
  for (;;) {
    current->launch->body();
    end_thread();  // comes back with another thread
  }
}

Thread* take_fiber() {
  if (idle.empty()) {
    constexpr int kChunk = 64;
    void* memory         = mmap(nullptr, kChunk * kStackBytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for the threads' stacks");
    for (int i = 0; i < kChunk; ++i) {
      idle.push_back(new Thread);
      idle.back()->stack = static_cast<unsigned char*>(memory) + i * kStackBytes;
    }
  }
  Thread* t = idle.back();
  idle.pop_back();
  if (t->fresh) {
    getcontext(&t->start);
    t->start.uc_stack.ss_sp   = t->stack;
    t->start.uc_stack.ss_size = kStackBytes;
    t->start.uc_link          = nullptr;
    makecontext(&t->start, fiber_main, 0);
    std::memcpy(t->stack, &kCanary, sizeof kCanary);
  }
  return t;
}

[[noreturn]] void resume(Thread* t) {
  current   = t;
  threadIdx = t->index;
  blockIdx  = t->home->index;
  blockDim  = t->launch->block;
  gridDim   = t->launch->grid;
  if (!t->fresh) _longjmp(t->context, 1);
  t->fresh = false;
  setcontext(&t->start);
  std::abort();
}

void land(size_t index);

// Draws what happens next: a ready thread runs, or a store under way lands.
[[noreturn]] void dispatch() {
  for (;;) {
    ++switches;
    const size_t n = ready.size() + stores.size();
    if (to_main || n == 0) _longjmp(main_context, 1);
    if (switches - first_switch > switch_limit)
      fail("too many switches of threads; they wait" + who_waits());
    if (switches - progress > 1000 + 64 * n) {
      fail("deadlock: the threads that do not wait only read a word again that nobody changes" +
           who_waits());
    }
    const size_t pick = random_below(n);
    if (pick < ready.size()) {
      Thread* t   = ready[pick];
      ready[pick] = ready.back();
      ready.pop_back();
      resume(t);
    }
    land(pick - ready.size());
  }
}

// The current thread is in `ready`, or someone will put it there.
__attribute__((noinline)) void switch_away() {
  if (_setjmp(current->context) == 0) dispatch();
}

void yield() {
  ready.push_back(current);
  switch_away();
}

void wait_at(const char* op, Site site) {
  current->op   = op;
  current->site = site;
  switch_away();
  current->op = nullptr;
}

void wake(std::vector<Thread*>& waiting) {
  ready.insert(ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

// ---- Clocks

// All accesses of each of these threads of one CTA are before what any of them does from now on.
void join(Thread* const* threads, size_t n) {
  const Thread& first = *threads[0];
  bool same           = true;
  bool dirty          = false;
  uint32_t clock      = 0;
  for (size_t i = 0; i < n; ++i) {
    const Thread& t = *threads[i];
    same  &= t.local == first.local && t.remote == first.remote &&
             t.known_before == first.known_before && t.knows_previous == first.knows_previous;
    dirty |= t.dirty;
    clock  = std::max(clock, t.clock);
  }
  if (same && !dirty) return;
  View joined  = first;
  joined.local = new Block(*first.local);
  for (size_t i = 0; i < n; ++i) {
    const Thread& t = *threads[i];
    if (i && t.local != threads[i - 1]->local) {
      for (size_t j = 0; j < t.local->clock.size(); ++j) {
        joined.local->clock[j] = std::max(joined.local->clock[j], t.local->clock[j]);
      }
    }
    if (i && t.remote != threads[i - 1]->remote) merge(joined.remote, t.remote);
    joined.known_before    = std::max(joined.known_before, t.known_before);
    joined.knows_previous |= t.knows_previous;
  }
  for (size_t i = 0; i < n; ++i) joined.local->clock[threads[i]->self] = threads[i]->clock;
  for (size_t i = 0; i < n; ++i) {
    Thread& t        = *threads[i];
    t.local          = joined.local;
    t.remote         = joined.remote;
    t.known_before   = joined.known_before;
    t.knows_previous = joined.knows_previous;
    // In step, so that a warp's lanes share their records.
    t.clock = clock + 1;
    t.dirty = false;
  }
}

// All that this thread has done and is behind.
Ref<Knowledge> release(Thread& t) {
  Ref<Block> own = new Block(*t.local);
  if (t.dirty) ++t.clock;
  own->clock[t.self]   = t.clock - 1;
  t.dirty              = false;
  t.local              = own;
  Ref<Knowledge> all   = t.remote ? new Knowledge(*t.remote) : new Knowledge(t.launch->num_ctas);
  all->known_before    = std::max(all->known_before, t.known_before);
  all->knows_previous |= t.knows_previous;
  all->ctas[t.cta - t.launch->first] = own;
  return all;
}

void acquire(View& view, const Ref<Knowledge>& all) {
  if (!all) return;
  merge(view.local, all->ctas[view.cta - view.launch->first]);
  merge(view.remote, all);
  view.known_before    = std::max(view.known_before, all->known_before);
  view.knows_previous |= all->knows_previous;
}

bool ordered(uint32_t cta, int thread, uint32_t clock, const View& v) {
  if (cta == v.cta) return thread == v.self || v.local->clock[thread] >= clock;
  if (cta < v.known_before) return true;
  if (cta < v.launch->first) {
    return v.knows_previous && v.launch->previous && cta >= v.launch->previous->first;
  }
  const uint32_t i = cta - v.launch->first;
  if (i >= uint32_t(v.launch->num_ctas) || !v.remote || !v.remote->ctas[i]) return false;
  return v.remote->ctas[i]->clock[thread] >= clock;
}

// ---- Memory

struct Region {
  uintptr_t begin, end;
  Cell* cells;  // zeros from the system until touched
  size_t cells_bytes;
};
std::map<uintptr_t, Region> regions;  // by end

std::vector<Reader> readers(1);  // lists; 0 ends one
uint32_t free_readers = 0;

uint32_t take_reader(const Reader& reader) {
  if (!free_readers) {
    readers.push_back(reader);
    return uint32_t(readers.size() - 1);
  }
  const uint32_t index = free_readers;
  free_readers         = readers[index].next;
  readers[index]       = reader;
  return index;
}
void drop_reader(uint32_t index) {
  readers[index].next = free_readers;
  free_readers        = index;
}
void drop_readers(Cell& cell) {
  while (cell.readers) {
    const uint32_t next = readers[cell.readers].next;
    drop_reader(cell.readers);
    cell.readers = next;
  }
}

// The records of what is accessed.
struct Place {
  Cell* cells;
  size_t count;
  bool shared;
};

std::string name_of_address(const void* address, const Cta& cta) {
  const auto a     = reinterpret_cast<uintptr_t>(address);
  const auto begin = reinterpret_cast<uintptr_t>(cta.shared);
  const auto size  = cta.launch->shared_bytes;
  if (a >= begin && a < begin + size) return format("byte %zu of shared memory", a - begin);
  // The nearest of all, from either end.
  std::string nearest = "no region is registered";
  uintptr_t distance  = UINTPTR_MAX;
  const auto consider = [&](uintptr_t begin, uintptr_t end, const char* what) {
    const uintptr_t away = a < begin ? begin - a : a >= end ? a - end : 0;
    if (away >= distance) return;
    distance = away;
    if (away == 0 && a < end) {
      nearest = format("byte %zu of %s of %zu bytes", a - begin, what, end - begin);
    } else {
      nearest = format("%zu bytes %s %s of %zu bytes at %p", away, a < begin ? "before" : "after",
                       what, end - begin, reinterpret_cast<void*>(begin));
    }
  };
  for (const auto& r : regions) consider(r.second.begin, r.second.end, "the region");
  if (size) consider(begin, begin + size, "the shared memory");
  return format("%p, ", address) + nearest;
}

Place locate(const char* op, const void* address, size_t bytes, Site site) {
  const auto a   = reinterpret_cast<uintptr_t>(address);
  const Cta& cta = *current->home;
  if (a % bytes) {
    fail_at(op, site, format("misaligned for %zu bytes: ", bytes) + name_of_address(address, cta));
  }
  const size_t count  = (bytes + kGranule - 1) / kGranule;
  const size_t offset = a - reinterpret_cast<uintptr_t>(cta.shared);
  if (offset < cta.launch->shared_bytes && offset + bytes <= cta.launch->shared_bytes) {
    return {current->home->cells.data() + offset / kGranule, count, true};
  }
  const auto after = regions.upper_bound(a);
  if (after == regions.end() || a < after->second.begin || a + bytes > after->second.end) {
    fail_at(
        op, site,
        format("the %zu bytes are not within any memory: ", bytes) + name_of_address(address, cta));
  }
  const Region& region = after->second;
  return {region.cells + (a - region.begin / kGranule * kGranule) / kGranule, count, false};
}

[[noreturn]] void race(const char* op, const void* address, Site site, const char* other,
                       uint32_t cta, int thread, int lanes, uint16_t number) {
  std::string who;
  const Launch* launch = current->launch;
  if (cta == current->cta) {
    who = "its own block";
  } else if (cta >= launch->first && cta < launch->first + uint32_t(launch->num_ctas)) {
    who = format("block number %u of the kernel", cta - launch->first);
  } else {
    who = cta < launch->first ? "the kernel before" : "the kernel after";
  }
  const char* thread_is = unsigned(thread) >= launch->block.x * launch->block.y * launch->block.z
                              ? "a store_async"
                              : "thread";
  std::string by        = format("%s %d of ", thread_is, thread) + who;
  if (lanes > 1) by = format("%d threads of warp %d of ", lanes, thread / kLanes) + who;
  fail_at(op, site,
          "race on " + name_of_address(address, *current->home) + ": no barrier orders it behind " +
              other + " at " + name_of(site_table[number]) + " by " + by);
}

std::string under_copy(const Cell& cell) {
  return " is being copied to since " + name_of(site_table[cell.site]) +
         ": no wait_copies of its thread lies between";
}

const char* name_of_load(Access access) {
  return access == kConstant ? "load_constant"
         : access == kAtomic ? "load_acquire"
         : access == kPastL1 ? "load_past_l1"
                             : "load";
}

void check_read(const Place& place, const void* address, Access access, Site site) {
  const char* op      = name_of_load(access);
  Thread& me          = *current;
  const uint32_t bit  = 1u << me.lane;
  const uint16_t warp = uint16_t(me.self / kLanes);
  const auto at       = [&](size_t i) { return static_cast<const char*>(address) + i * kGranule; };
  me.dirty            = true;
  const uint16_t number = number_of(site);
  for (size_t i = 0; i < place.count; ++i) {
    Cell& cell = place.cells[i];
    if (cell.flags & kPending) {
      fail_at(op, site, name_of_address(at(i), *me.home) + under_copy(cell));
    }
    if (cell.flags & kIsBarrier) fail_at(op, site, "the address is a barrier's");
    if (!cell.cta) {
      if (place.shared) {
        fail_at(op, site, name_of_address(at(i), *me.home) + " has never been written");
      }
    } else if (access == kConstant && cell.cta >= me.launch->base) {
      const char* who =
          cell.cta >= me.launch->first ? "this kernel" : "the kernel before, which it may overlap,";
      fail_at(op, site,
              name_of_address(at(i), *me.home) + " has been written by " + who + " at " +
                  name_of(site_table[cell.site]));
    } else if (!(access == kAtomic && (cell.flags & kAtomicWrite)) &&
               !ordered(cell.cta, cell.thread, cell.clock, me)) {
      race(op, at(i), site, "a write", cell.cta, cell.thread, 1, cell.site);
    } else if (access == kPlain && !place.shared && cell.cta >= me.launch->base &&
               cell.cta < me.launch->first) {
      fail_at(op, site,
              name_of_address(at(i), *me.home) +
                  " has been written by the kernel before, which it may overlap, at " +
                  name_of(site_table[cell.site]) + ": its line of L1 may be older");
    }

    // Those that this thread is behind need no record any more: a write behind it is behind them.
    // Not so what must not be written at all.
    bool recorded = false;
    int kept      = 0;
    if (cell.readers) {
      const Reader& r = readers[cell.readers];
      recorded = r.cta == me.cta && r.clock == me.clock && r.warp == warp && r.access == access;
    }
    if (recorded) {
      readers[cell.readers].lanes |= bit;
      continue;
    }
    for (uint32_t* link = &cell.readers; *link;) {
      Reader& r         = readers[*link];
      const bool behind = [&] {
        if (r.access == kConstant) return r.cta < me.known_before;
        for (uint32_t lanes = r.lanes; lanes; lanes &= lanes - 1) {
          if (!ordered(r.cta, r.warp * kLanes + __builtin_ctz(lanes), r.clock, me)) return false;
        }
        return true;
      }();
      if (r.access == kConstant && access == kConstant && r.cta >= me.launch->first) {
        recorded = true;  // one record of a launch is enough
      } else if (r.cta == me.cta && r.clock == me.clock && r.warp == warp && r.access == access) {
        r.lanes  |= bit;
        recorded  = true;
      }
      if (behind && !recorded) {
        const uint32_t gone = *link;
        *link               = r.next;
        drop_reader(gone);
      } else {
        if (recorded) break;
        ++kept;
        link = &r.next;
      }
    }
    if (recorded) continue;
    const Reader reader = {me.cta, me.clock, bit, cell.readers, warp, uint16_t(access), number};
    if (!place.shared && kept >= kGlobalReaders) {
      uint32_t victim = cell.readers;
      for (size_t j = random_below(size_t(kept)); j; --j) victim = readers[victim].next;
      if (readers[victim].access != kConstant) {
        const uint32_t next  = readers[victim].next;
        readers[victim]      = reader;
        readers[victim].next = next;
      }
    } else {
      cell.readers = take_reader(reader);
    }
  }
}

// A write by whoever has the view: a thread at its clock, or a store under way.
void check_write(const char* op, const Place& place, const void* address, const View& view,
                 bool atomic, Site site) {
  for (size_t i = 0; i < place.count; ++i) {
    Cell& cell    = place.cells[i];
    const auto at = static_cast<const char*>(address) + i * kGranule;
    if (cell.flags & kPending) {
      fail_at(op, site, name_of_address(at, *current->home) + under_copy(cell));
    }
    if (cell.flags & kIsBarrier) fail_at(op, site, "the address is a barrier's");
    if (cell.cta && !(atomic && (cell.flags & kAtomicWrite)) &&
        !ordered(cell.cta, cell.thread, cell.clock, view)) {
      race(op, at, site, "a write", cell.cta, cell.thread, 1, cell.site);
    }
    for (uint32_t index = cell.readers; index; index = readers[index].next) {
      const Reader& r = readers[index];
      if (r.access == kConstant && r.cta >= view.launch->first) {
        fail_at(op, site,
                name_of_address(at, *current->home) + " is read by load_constant at " +
                    name_of(site_table[r.site]));
      }
      if (atomic && r.access == kAtomic) continue;
      for (uint32_t lanes = r.lanes; lanes; lanes &= lanes - 1) {
        const int thread = r.warp * kLanes + __builtin_ctz(lanes);
        if (!ordered(r.cta, thread, r.clock, view)) {
          race(op, at, site, "a read", r.cta, thread, __builtin_popcount(r.lanes), r.site);
        }
      }
    }
    drop_readers(cell);
  }
}

void record_write(const Place& place, uint32_t cta, int thread, uint32_t clock, int flags,
                  Site site) {
  const uint16_t number = number_of(site);
  for (size_t i = 0; i < place.count; ++i) {
    Cell& cell  = place.cells[i];
    cell.cta    = cta;
    cell.clock  = clock;
    cell.thread = uint16_t(thread & 0xfff);
    cell.flags  = uint16_t(flags & 15);
    cell.site   = number;
  }
}

void write_by_current(const char* op, const Place& place, const void* address, int flags,
                      Site site) {
  check_write(op, place, address, *current, flags & kAtomicWrite, site);
  record_write(place, current->cta, current->self, current->clock, flags, site);
  current->dirty = true;
}

void let_others_run() {
  progress = switches;
  if (happens(switch_probability)) yield();
}

// What store_release has released last, by address, and the launch.
std::map<const void*, std::pair<int, Ref<Knowledge>>> released;

// ---- The list of barriers

struct SiteKey {
  const void* file;
  int line;
  const void* op;
  bool operator<(const SiteKey& o) const {
    return std::tie(line, file, op) < std::tie(o.line, o.file, o.op);
  }
};
std::map<SiteKey, int> site_numbers;
std::vector<std::unique_ptr<std::string>> sites;
std::string disabled_site;
int disabled_number = -1;

bool disabled(Site site, const char* op) {
  const auto known = site_numbers.find({site.file, site.line, op});
  if (known != site_numbers.end()) return known->second == disabled_number;
  const std::string name = name_of(site) + " " + op;
  int number             = 0;
  while (size_t(number) < sites.size() && *sites[number] != name) ++number;
  if (size_t(number) == sites.size()) sites.push_back(std::make_unique<std::string>(name));
  site_numbers[{site.file, site.line, op}] = number;
  if (name == disabled_site) disabled_number = number;
  return number == disabled_number;
}

// ---- Collectives of a warp: the last lane to come performs it for all.

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

template <class Perform>
void collective(const char* op, Site site, void* argument, const Perform& perform) {
  Warp& warp = current->home->warps[size_t(current->self / kLanes)];
  progress   = switches;
  if (warp.alive < kLanes) {
    fail_at(op, site, format("only %d lanes of the warp are left to take part", warp.alive));
  }
  if (warp.arrived && (warp.op != op || !same(warp.site, site))) {
    fail_at(op, site,
            "diverged: other lanes of the warp wait at " + std::string(warp.op) + " " +
                name_of(warp.site));
  }
  warp.op           = op;
  warp.site         = site;
  current->argument = argument;
  if (++warp.arrived < kLanes) {
    wait_at(op, site);
  } else {
    warp.arrived = 0;
    perform(warp);
    for (Thread* t : warp.lanes) ready.push_back(t);
    switch_away();
  }
  current->argument = nullptr;
}

// ---- Barriers of threads

// All that are left of the CTA have come.
void open_cta_barrier(Cta& cta) {
  static std::vector<Thread*> there;
  there.clear();
  for (Thread* t : cta.threads) {
    if (t) there.push_back(t);
  }
  join(there.data(), there.size());
  cta.arrived = 0;
  wake(there);
}

void open_cluster_barrier(Cluster& cluster) {
  cluster.ended     = cluster.gathering;
  cluster.gathering = nullptr;
  cluster.arrived   = 0;
  ++cluster.phase;
  wake(cluster.waiting);
}

void open_grid_barrier(Group& group) {
  Ref<Knowledge> all = new Knowledge(size_t(group.launch->num_ctas));
  for (Cta& cta : group.ctas) {
    join(cta.threads.data(), cta.threads.size());
    const Thread& any                          = *cta.threads[0];
    all->ctas[cta.number - cta.launch->first]  = any.local;
    all->known_before                          = std::max(all->known_before, any.known_before);
    all->knows_previous                       |= any.knows_previous;
  }
  for (Cta& cta : group.ctas) {
    for (Thread* t : cta.threads) {
      t->remote         = all;  // more than it has known before
      t->known_before   = all->known_before;
      t->knows_previous = all->knows_previous;
    }
    ready.insert(ready.end(), cta.threads.begin(), cta.threads.end());
  }
  group.arrived = 0;
}

// ---- Barriers in shared memory

Mbarrier& find_barrier(const char* op, Cta& cta, uint32_t offset, bool remote, Site site) {
  const auto found = cta.barriers.find(offset);
  if (found == cta.barriers.end()) {
    fail_at(op, site, format("no barrier_init at byte %u of ", offset) + name_of(cta));
  }
  Mbarrier& barrier = found->second;
  if (!ordered(cta.number, barrier.thread, barrier.clock, *current)) {
    fail_at(op, site, "not ordered behind barrier_init");
  }
  if (remote && !barrier.fenced) {
    fail_at(op, site, "no fence_barrier_init between barrier_init and a barrier of the cluster");
  }
  return barrier;
}

void end_phase(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  merge(barrier.ended, barrier.gathering);
  barrier.gathering = nullptr;
  wake(barrier.waiting);
}

void arrive(const char* op, Mbarrier& barrier, Site site) {
  if (barrier.pending == 0) {
    fail_at(op, site, format("more arrivals in a phase than %d", barrier.count));
  }
  --barrier.pending;
  merge(barrier.gathering, release(*current));
  end_phase(barrier);
}

uint32_t local_offset(const char* op, const void* address, uint32_t alignment, Site site) {
  const size_t offset =
      reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(current->home->shared);
  if (offset >= current->home->launch->shared_bytes) {
    fail_at(op, site, "not in shared memory: " + name_of_address(address, *current->home));
  }
  if (offset % alignment) fail_at(op, site, "misaligned");
  return uint32_t(offset);
}

// Addresses of the shared space: the rank plus one above, 0 for the CTA itself; the offset below.
constexpr int kRankShift = 24;

Cta& cta_of(const char* op, uint32_t address, uint32_t bytes, Site site) {
  const uint32_t rank   = address >> kRankShift;
  const uint32_t offset = address & ((1u << kRankShift) - 1);
  Cta& own              = *current->home;
  Cta& cta              = rank == 0 ? own : (&own)[int(rank) - 1 - own.rank];
  if (offset + bytes > own.launch->shared_bytes || offset % bytes) {
    fail_at(op, site, format("byte %u of shared memory: outside of it, or misaligned", offset));
  }
  if (cta.alive == 0) fail_at(op, site, name_of(cta) + " has ended already");
  return cta;
}

// A store under way lands. It runs on whichever fiber drew it, so that the error names its own.
void land(size_t index) {
  const StoreUnderWay store = stores[index];
  stores[index]             = stores.back();
  stores.pop_back();
  progress                  = switches;
  Cta& target               = *store.target;
  Mbarrier& barrier         = target.barriers.at(store.barrier);
  unsigned char* const to   = target.shared + store.offset;
  const Place place         = {target.cells.data() + store.offset / kGranule, 4 / kGranule, true};
  Thread* const interrupted = current;
  current                   = target.threads[0];  // for the message
  for (Thread* t : target.threads) {
    if (t) current = t;
  }
  // Seen from the target's CTA if that is the issuer's too.
  check_write("store_async", place, to, store.view, false, store.site);
  current = interrupted;
  ++barrier.landed;
  const int writer = int(target.threads.size()) + barrier.slot;
  record_write(place, target.number, writer, barrier.landed, 0, store.site);
  std::memcpy(to, &store.value, 4);
  Ref<Knowledge> all = new Knowledge(*store.view.remote);
  Ref<Block>& block  = all->ctas[target.number - target.launch->first];
  block              = block ? new Block(*block) : new Block(target.threads.size() + kBarriers);
  block->clock[size_t(writer)] = barrier.landed;
  merge(barrier.gathering, all);
  barrier.bytes -= 4;
  end_phase(barrier);
}

// ---- Threads, CTAs and launches begin and end

void trigger(Cta& cta, const View& by) {
  if (cta.triggered) return;
  cta.triggered   = true;
  uint32_t& known = cta.launch->known_at_trigger;
  known           = std::min(known, by.known_before);
  if (++cta.launch->ctas_triggered == cta.launch->num_ctas) to_main = true;
}

void end_cta(Cta& cta) {
  trigger(cta, cta.at_end);
  const std::string who = name_of(cta) + " of " + name_of(*cta.launch);
  for (const StoreUnderWay& store : stores) {
    if (store.target == &cta) {
      fail(who + " ends while a store_async to it is under way, from " + name_of(store.site));
    }
  }
  for (const auto& entry : cta.barriers) {
    const Mbarrier& barrier = entry.second;
    const size_t writer     = cta.threads.size() + size_t(barrier.slot);
    if (cta.at_end.local->clock[writer] < barrier.landed) {
      fail(who + " ends without having waited for every store_async to it");
    }
    for (const auto& arrival : barrier.remote) {
      if (!ordered(arrival.cta, arrival.thread, arrival.clock, cta.at_end)) {
        fail(who + " ends without having waited for every barrier_arrive_remote to it");
      }
    }
  }
}

void end_thread() {
  Thread& me = *current;
  Cta& cta   = *me.home;
  Group& all = *cta.group;
  Warp& warp = cta.warps[size_t(me.self / kLanes)];
  progress   = switches;
  if (std::memcmp(me.stack, &kCanary, sizeof kCanary) != 0) {
    fail("the stack of " + name_of(me) + " was too small");
  }
  if (warp.arrived) {
    fail(name_of(me) + " ends while other lanes of its warp wait at " + warp.op + " " +
         name_of(warp.site));
  }
  View& end = cta.at_end;
  for (size_t i = 0; i < end.local->clock.size(); ++i) {
    end.local->clock[i] = std::max(end.local->clock[i], me.local->clock[i]);
  }
  end.local->clock[size_t(me.self)] = me.clock;
  merge(end.remote, me.remote);
  end.known_before              = std::max(end.known_before, me.known_before);
  end.knows_previous           |= me.knows_previous;
  cta.threads[size_t(me.self)]  = nullptr;
  --warp.alive;
  if (me.in_cluster_barrier && me.cluster_phase == cta.cluster->phase) --cta.cluster->arrived;
  --cta.cluster->alive;
  if (--cta.alive == 0) {
    end_cta(cta);
  } else if (cta.arrived == cta.alive) {
    open_cta_barrier(cta);
  }
  if (cta.cluster->alive && cta.cluster->arrived == cta.cluster->alive) {
    open_cluster_barrier(*cta.cluster);
  }
  if (--all.alive == 0) to_main = true;
  me.copies.clear();
  static_cast<View&>(me) = View{};
  idle.push_back(&me);
  switch_away();
}

uint3 unravel(unsigned i, dim3 size) {
  return {i % size.x, i / size.x % size.y, i / size.x / size.y};
}

void start_group(const std::shared_ptr<Launch>& launch) {
  const int index = launch->order.back();
  launch->order.pop_back();
  groups.push_back(std::make_unique<Group>());
  Group& group             = *groups.back();
  const dim3 grid          = launch->grid;
  const dim3 cluster       = launch->cluster;
  const dim3 clusters      = {grid.x / cluster.x, grid.y / cluster.y, grid.z / cluster.z};
  const int cluster_size   = int(cluster.x * cluster.y * cluster.z);
  const size_t num_threads = size_t(launch->block.x) * launch->block.y * launch->block.z;
  group.launch             = launch;
  group.ctas.resize(size_t(launch->group_size));
  group.clusters.resize(size_t(launch->group_size / cluster_size));
  for (int i = 0; i < launch->group_size; ++i) {
    Cta& cta         = group.ctas[size_t(i)];
    const int serial = index * launch->group_size + i;
    const uint3 of   = unravel(unsigned(serial / cluster_size), clusters);
    const uint3 in   = unravel(unsigned(serial % cluster_size), cluster);
    cta.index        = {of.x * cluster.x + in.x, of.y * cluster.y + in.y, of.z * cluster.z + in.z};
    cta.group        = &group;
    cta.launch       = launch.get();
    cta.cluster      = &group.clusters[size_t(i / cluster_size)];
    cta.rank         = serial % cluster_size;
    cta.number       = launch->first + uint32_t(serial);
    // As large as aligned_alloc likes it; the accesses are checked against the size asked for.
    const size_t bytes = (launch->shared_bytes + 127) / 128 * 128 + 128;
    cta.shared         = static_cast<unsigned char*>(std::aligned_alloc(128, bytes));
    std::memset(cta.shared, 0xff, bytes);
    cta.cells.resize(launch->shared_bytes / kGranule + 1);
    cta.alive           = int(num_threads);
    cta.cluster->alive += cta.alive;
    group.alive        += cta.alive;
    cta.warps.resize((num_threads + kLanes - 1) / kLanes);
    cta.at_end.launch       = launch.get();
    cta.at_end.cta          = cta.number;
    cta.at_end.self         = -1;
    cta.at_end.local        = new Block(num_threads + kBarriers);
    cta.at_end.known_before = launch->base;
    for (size_t k = 0; k < num_threads; ++k) {
      Thread& t             = *take_fiber();
      static_cast<View&>(t) = cta.at_end;
      t.self                = int(k);
      t.index               = unravel(unsigned(k), launch->block);
      t.home                = &cta;
      t.lane                = int(k % kLanes);
      t.clock               = 1;
      t.dirty               = false;
      t.op                  = nullptr;
      t.copy_group          = 0;
      t.in_cluster_barrier  = false;
      t.spin_address        = nullptr;
      Warp& warp            = cta.warps[k / kLanes];
      warp.lanes.push_back(&t);
      ++warp.alive;
      cta.threads.push_back(&t);
      ready.push_back(&t);
    }
    cta.at_end.local = new Block(*cta.at_end.local);  // the threads share the other
  }
  launch->ctas_running += launch->group_size;
}

void free_memory(Group& group) {
  for (Cta& cta : group.ctas) {
    for (Cell& cell : cta.cells) drop_readers(cell);
    std::free(cta.shared);
  }
}

void end_launch(Launch& launch) {
  launch.ended        = true;
  launch.known_at_end = launch.base;
  if (launch.any_waited) {
    const Launch& p = *launch.previous;
    // Behind the one before, and all before that if those were known to have ended by then.
    launch.known_at_end = p.known_at_end == p.first ? launch.first : p.known_at_end;
  }
  wake(launch.waiting);
  launch.previous.reset();
}

// Ends what has ended, and starts what may start.
void keep_house() {
  to_main = false;
  for (size_t i = groups.size(); i-- > 0;) {
    if (groups[i]->alive) continue;
    Launch& launch       = *groups[i]->launch;
    launch.ctas_running -= launch.group_size;
    launch.ctas_ended   += launch.group_size;
    free_memory(*groups[i]);
    groups.erase(groups.begin() + std::ptrdiff_t(i));
  }
  // In order, so that a launch that waits for the one before finds it ended.
  for (auto& launch : queue) {
    if (launch->ctas_ended == launch->num_ctas && !launch->ended) end_launch(*launch);
  }
  while (!queue.empty() && queue.front()->ended) queue.pop_front();
  if (queue.empty()) released.clear();
  for (auto& launch : queue) {
    const Launch* previous = launch->previous.get();
    if (previous && previous->ctas_triggered < previous->num_ctas) break;
    if (previous) launch->base = previous->known_at_trigger;
    while (!launch->order.empty() &&
           (launch->ctas_running == 0 ||
            launch->ctas_running + launch->group_size <= ctas_in_flight)) {
      start_group(launch);
    }
  }
}

// Everything is dropped where it stands; what kernels hold needs no destructors.
void abandon() {
  for (auto& group : groups) {
    for (Cta& cta : group->ctas) {
      for (Thread* t : cta.threads) {
        if (!t) continue;
        t->fresh = true;
        t->copies.clear();
        static_cast<View&>(*t) = View{};
        idle.push_back(t);
      }
    }
    free_memory(*group);
  }
  groups.clear();
  ready.clear();
  stores.clear();
  queue.clear();
  released.clear();
  to_main = false;
}

// Until this launch has ended, or with null all. All fibers come back to the one line, and go on
// from there: no local of that function would survive it.
const Launch* awaited;

__attribute__((noinline)) bool go_on() {
  current = nullptr;
  if (!failed) {
    keep_house();
    if (queue.empty() || (awaited && awaited->ended)) return true;
    progress = switches;
    if (!ready.empty() || !stores.empty()) dispatch();
    fail("deadlock: all threads wait" + who_waits());
  }
  abandon();
  last_error = cudaErrorLaunchFailure;
  return false;
}

bool run_until(const Launch* launch) {
  awaited      = launch;
  first_switch = switches;
  _setjmp(main_context);
  return go_on();
}

}  // namespace

// ---- What threads call

void read(void* value, const void* address, size_t bytes, Access access, Site site) {
  let_others_run();
  const char* op    = name_of_load(access);
  const Place place = locate(op, address, bytes, site);
  if (place.shared && access != kPlain) fail_at(op, site, "not global memory");
  check_read(place, address, access, site);
  std::memcpy(value, address, bytes);
}

void write(void* address, const void* value, size_t bytes, Access, Site site) {
  let_others_run();
  write_by_current("store", locate("store", address, bytes, site), address, 0, site);
  std::memcpy(address, value, bytes);
}

unsigned char* shared_memory() { return current->home->shared; }

void copy_async(void* shared, const void* global, Site site) {
  let_others_run();
  const Place from = locate("copy_async", global, 16, site);
  const Place to   = locate("copy_async", shared, 16, site);
  if (from.shared || !to.shared) fail_at("copy_async", site, "not from global to shared memory");
  check_read(from, global, kPlain, site);
  write_by_current("copy_async", to, shared, kPending, site);
  std::memset(shared, 0xff, 16);
  current->copies.push_back({static_cast<unsigned char*>(shared),
                             static_cast<const unsigned char*>(global), current->copy_group, site});
}

void commit_copies() { ++current->copy_group; }

void wait_copies(int pending, Site site) {
  if (disabled(site, "wait_copies")) return;
  Thread& me       = *current;
  const auto begin = me.copies.begin();
  auto end         = begin;  // groups only grow
  for (; end != me.copies.end() && end->group < me.copy_group - pending; ++end) {
    // The source must not have changed meanwhile.
    check_read(locate("copy_async", end->global, 16, end->site), end->global, kPlain, end->site);
    const Place to = locate("copy_async", end->shared, 16, end->site);
    record_write(to, me.cta, me.self, me.clock, 0, end->site);
    std::memcpy(end->shared, end->global, 16);
    me.dirty = true;
  }
  me.copies.erase(begin, end);
  if (happens(switch_probability)) yield();
}

uint32_t load_acquire(const uint32_t* address, Site site) {
  const bool relaxed = disabled(site, "load_acquire");
  yield();
  const Place place = locate("load_acquire", address, 4, site);
  if (place.shared) fail_at("load_acquire", site, "not global memory");
  check_read(place, address, kAtomic, site);
  const uint32_t value = *address;
  const auto found     = released.find(address);
  if (!relaxed && found != released.end() && found->second.first == current->launch->serial) {
    acquire(*current, found->second.second);
  }
  // The same again is no progress.
  if (current->spin_address != address || current->spin_value != value) progress = switches;
  current->spin_address = address;
  current->spin_value   = value;
  return value;
}

void store_release(uint32_t* address, uint32_t value, Site site) {
  const bool relaxed = disabled(site, "store_release");
  progress           = switches;
  yield();
  const Place place = locate("store_release", address, 4, site);
  if (place.shared) fail_at("store_release", site, "not global memory");
  write_by_current("store_release", place, address, kAtomicWrite, site);
  released[address] = {current->launch->serial, relaxed ? Ref<Knowledge>() : release(*current)};
  *address          = value;
}

int lane() { return current->lane; }

void sync_warp(Site site) {
  if (disabled(site, "sync_warp")) return;
  collective("sync_warp", site, nullptr,
             [](Warp& warp) { join(warp.lanes.data(), warp.lanes.size()); });
}

void shuffle(void* value, size_t bytes, int lane, Site site) {
  struct Argument {
    void* value;
    size_t bytes;
    int lane;
  } argument = {value, bytes, lane};
  collective("shuffle", site, &argument, [](Warp& warp) {
    uint64_t values[kLanes] = {};
    const auto of = [&](int i) { return static_cast<Argument*>(warp.lanes[i]->argument); };
    for (int i = 0; i < kLanes; ++i) std::memcpy(&values[i], of(i)->value, of(i)->bytes);
    for (int i = 0; i < kLanes; ++i) std::memcpy(of(i)->value, &values[of(i)->lane], of(i)->bytes);
    if (collectives_order) join(warp.lanes.data(), warp.lanes.size());
  });
}

namespace {

float of_half(Product type, uint32_t bits) {
  return type == kBf16 ? fusedrnn::to_float(fusedrnn::bfloat16{uint16_t(bits)})
                       : fusedrnn::to_float(fusedrnn::float16{uint16_t(bits)});
}

struct Operands {
  float* d;
  const uint32_t *a, *b;
};

// d [16, 8] += a [16, k] b [k, 8], with the fragments that ptx.cuh lists.
void multiply(Product type, const Warp& warp) {
  float a[16][16], b[16][8], d[16][8];
  const int k_size = type == kTf32 ? 8 : 16;
  for (int l = 0; l < kLanes; ++l) {
    const Operands& of = *static_cast<Operands*>(warp.lanes[size_t(l)]->argument);
    const int g = l / 4, i = l % 4;
    for (int r = 0; r < 4; ++r) d[g + 8 * (r / 2)][2 * i + r % 2] = of.d[r];
    if (type == kTf32) {
      const auto value = [](uint32_t bits) { return fusedrnn::bit_cast<float>(bits & ~0x1fffu); };
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][i + 4 * (r / 2)] = value(of.a[r]);
      for (int r = 0; r < 2; ++r) b[i + 4 * r][g] = value(of.b[r]);
    } else {
      for (int r = 0; r < 8; ++r) {  // the halves of the words
        const uint32_t bits                                 = of.a[r / 2] >> (16 * (r % 2));
        a[g + 8 * (r / 2 % 2)][2 * i + r % 2 + 8 * (r / 4)] = of_half(type, bits);
      }
      for (int r = 0; r < 4; ++r) {
        b[2 * i + r % 2 + 8 * (r / 2)][g] = of_half(type, of.b[r / 2] >> (16 * (r % 2)));
      }
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < k_size; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    const Operands& of = *static_cast<Operands*>(warp.lanes[size_t(l)]->argument);
    for (int r = 0; r < 4; ++r) of.d[r] = d[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2];
  }
}

}  // namespace

void mma(Product type, float* d, const uint32_t* a, const uint32_t* b, Site site) {
  static const char* const kNames[] = {"mma_bf16", "mma_f16", "mma_tf32"};
  Operands operands                 = {d, a, b};
  collective(kNames[type], site, &operands, [type](Warp& warp) {
    multiply(type, warp);
    if (collectives_order) join(warp.lanes.data(), warp.lanes.size());
  });
}

void sync_threads(Site site) {
  if (disabled(site, "sync_threads")) return;
  Cta& cta = *current->home;
  progress = switches;
  if (cta.arrived && !same(cta.barrier_site, site)) {
    fail_at("sync_threads", site, "others wait at " + name_of(cta.barrier_site));
  }
  cta.barrier_site = site;
  if (++cta.arrived == cta.alive) {
    open_cta_barrier(cta);
    switch_away();  // it is ready too
  } else {
    wait_at("sync_threads", site);
  }
}

void sync_grid(Site site) {
  if (disabled(site, "sync_grid")) return;
  Group& group = *current->home->group;
  progress     = switches;
  if (!group.launch->cooperative) fail_at("sync_grid", site, "the launch is not cooperative");
  if (size_t(++group.arrived) == group.ctas.size() * current->home->threads.size()) {
    open_grid_barrier(group);
    switch_away();
  } else {
    wait_at("sync_grid", site);
  }
}

void wait_for_previous_kernel(Site site) {
  if (disabled(site, "wait_for_previous_kernel")) return;
  Thread& me     = *current;
  Launch& launch = *me.launch;
  progress       = switches;
  if (!launch.previous || device.major < 9) return;
  const Launch& previous = *launch.previous;
  if (!previous.ended) {
    launch.previous->waiting.push_back(&me);
    wait_at("wait_for_previous_kernel", site);
  }
  launch.any_waited = true;
  me.knows_previous = true;
  me.known_before =
      std::max(me.known_before,
               previous.known_at_end == previous.first ? launch.first : previous.known_at_end);
}

void let_next_kernel_start() {
  if (device.major >= 9) trigger(*current->home, *current);
  if (to_main) yield();
}

// ---- Clusters

namespace {
int size_of_cluster() {
  const dim3 cluster = current->launch->cluster;
  return int(cluster.x * cluster.y * cluster.z);
}
void needs_sm90(const char* op, Site site) {
  progress = switches;
  if (device.major < 9) fail_at(op, site, "the device has no clusters");
}
}  // namespace

int cluster_rank() { return current->home->rank; }
int cluster_size() { return size_of_cluster(); }

void cluster_arrive(Site site) {
  if (disabled(site, "cluster_arrive")) return;
  needs_sm90("cluster_arrive", site);
  Thread& me       = *current;
  Cluster& cluster = *me.home->cluster;
  if (me.in_cluster_barrier) fail_at("cluster_arrive", site, "no cluster_wait since the last");
  me.in_cluster_barrier = true;
  me.cluster_phase      = cluster.phase;
  merge(cluster.gathering, release(me));
  if (++cluster.arrived == cluster.alive) open_cluster_barrier(cluster);
  if (happens(switch_probability)) yield();
}

void cluster_wait(Site site) {
  if (disabled(site, "cluster_wait")) return;
  needs_sm90("cluster_wait", site);
  Thread& me       = *current;
  Cluster& cluster = *me.home->cluster;
  if (!me.in_cluster_barrier) fail_at("cluster_wait", site, "no cluster_arrive before");
  if (cluster.phase == me.cluster_phase) {
    cluster.waiting.push_back(&me);
    wait_at("cluster_wait", site);
  } else {
    yield();
  }
  me.in_cluster_barrier = false;
  acquire(me, cluster.ended);
}

uint32_t shared_address(const void* address, Site site) {
  return local_offset("shared_address", address, 1, site);
}

uint32_t remote_address(uint32_t address, int rank, Site site) {
  needs_sm90("remote_address", site);
  if (rank < 0 || rank >= size_of_cluster()) {
    fail_at("remote_address", site, format("the cluster has no rank %d", rank));
  }
  return uint32_t(rank + 1) << kRankShift | (address & ((1u << kRankShift) - 1));
}

void store_async(uint32_t remote, uint32_t value, uint32_t remote_barrier, Site site) {
  needs_sm90("store_async", site);
  let_others_run();
  Cta& target           = cta_of("store_async", remote, 4, site);
  const uint32_t offset = (1u << kRankShift) - 1;
  if (&cta_of("store_async", remote_barrier, 8, site) != &target) {
    fail_at("store_async", site, "the barrier lies in another CTA than the word");
  }
  find_barrier("store_async", target, remote_barrier & offset, &target != current->home, site);
  StoreUnderWay store       = {{}, &target, remote & offset, value, remote_barrier & offset, site};
  store.view.remote         = release(*current);
  store.view.launch         = current->launch;
  store.view.cta            = current->cta;
  store.view.self           = -1;
  store.view.local          = current->local;
  store.view.known_before   = current->known_before;
  store.view.knows_previous = current->knows_previous;
  stores.push_back(store);
}

void barrier_init(uint64_t* barrier, int count, Site site) {
  if (disabled(site, "barrier_init")) return;
  needs_sm90("barrier_init", site);
  let_others_run();
  Cta& cta              = *current->home;
  const uint32_t offset = local_offset("barrier_init", barrier, 8, site);
  if (cta.barriers.count(offset)) fail_at("barrier_init", site, "it is one already");
  if (cta.barriers.size() == kBarriers) fail_at("barrier_init", site, "too many barriers");
  if (count < 1) fail_at("barrier_init", site, "for nobody");
  write_by_current("barrier_init", locate("barrier_init", barrier, 8, site), barrier, kIsBarrier,
                   site);
  Mbarrier made;
  made.count = made.pending = count;
  made.thread               = current->self;
  made.clock                = current->clock;
  made.slot                 = int(cta.barriers.size());
  cta.barriers.emplace(offset, made);
}

void fence_barrier_init(Site site) {
  if (disabled(site, "fence_barrier_init")) return;
  needs_sm90("fence_barrier_init", site);
  for (auto& entry : current->home->barriers) {
    if (entry.second.thread == current->self) entry.second.fenced = true;
  }
}

namespace {
Mbarrier& own_barrier(const char* op, uint64_t* barrier, Site site) {
  needs_sm90(op, site);
  let_others_run();
  return find_barrier(op, *current->home, local_offset(op, barrier, 8, site), false, site);
}
}  // namespace

void barrier_expect(uint64_t* barrier, int bytes, Site site) {
  if (disabled(site, "barrier_expect")) return;
  Mbarrier& b  = own_barrier("barrier_expect", barrier, site);
  b.bytes     += bytes;
  arrive("barrier_expect", b, site);
}

void barrier_arrive(uint64_t* barrier, Site site) {
  if (disabled(site, "barrier_arrive")) return;
  arrive("barrier_arrive", own_barrier("barrier_arrive", barrier, site), site);
}

void barrier_arrive_remote(uint32_t remote, Site site) {
  static const char* const op = "barrier_arrive_remote";
  if (disabled(site, op)) return;
  needs_sm90(op, site);
  let_others_run();
  Cta& target           = cta_of(op, remote, 8, site);
  const uint32_t offset = remote & ((1u << kRankShift) - 1);
  Mbarrier& b           = find_barrier(op, target, offset, &target != current->home, site);
  current->dirty        = true;  // so that this arrival has a clock of its own
  if (&target != current->home) b.remote.push_back({current->cta, current->self, current->clock});
  arrive(op, b, site);
}

bool barrier_try_wait(uint64_t* barrier, int parity, Site site) {
  if (disabled(site, "barrier_try_wait")) return true;
  Mbarrier& b = own_barrier("barrier_try_wait", barrier, site);
  if (int(b.phase & 1) == parity) {
    // Now and then in vain, as on a device; else until the phase ends, so that a deadlock is seen.
    if (happens(0.25)) {
      yield();
      return false;
    }
    b.waiting.push_back(current);
    wait_at("barrier_try_wait", site);
    // If two phases have ended meanwhile, this thread is too late, and is told so.
    if (int(b.phase & 1) == parity) return false;
  }
  acquire(*current, b.ended);
  // What it is behind now need not be waited for again.
  auto& remote    = b.remote;
  const auto past = [](const Mbarrier::Arrival& a) {
    return ordered(a.cta, a.thread, a.clock, *current);
  };
  remote.erase(std::remove_if(remote.begin(), remote.end(), past), remote.end());
  return true;
}

// ---- Launches

namespace {
std::map<const void*, int> opted_in;  // bytes of dynamic shared memory, by kernel
constexpr int kSharedBytes = 48 * 1024;

int most_shared_bytes(const void* kernel) {
  const auto found = opted_in.find(kernel);
  return std::min(found == opted_in.end() ? kSharedBytes : found->second, device.shared_bytes);
}

cudaError_t result(cudaError_t e) {
  if (e != cudaSuccess) last_error = e;
  return e;
}

bool finish_all() { return !failed && run_until(nullptr); }
}  // namespace

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      value > device.shared_bytes) {
    return result(cudaErrorInvalidValue);
  }
  opted_in[kernel] = value;
  return cudaSuccess;
}

cudaError_t get_attributes(cudaFuncAttributes* attributes, const void* kernel) {
  const int version = 10 * device.major + device.minor;
  *attributes       = {0, 0, 0, 1024, 64, version, version, most_shared_bytes(kernel)};
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, const void*, int threads, size_t shared_bytes) {
  const int shared = int(shared_bytes) + 1024;  // what each CTA takes beside
  *blocks = std::min({32, 2048 / std::max(threads, 1), (device.shared_bytes + 1024) / shared});
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   std::function<void()> body) {
  const std::lock_guard<std::recursive_mutex> lock(api);
  if (device.count == 0) return result(cudaErrorNoDevice);
  if (failed) return result(cudaErrorLaunchFailure);
  auto launch          = std::make_shared<Launch>();
  launch->body         = std::move(body);
  launch->kernel       = kernel;
  launch->grid         = config.gridDim;
  launch->block        = config.blockDim;
  launch->shared_bytes = config.dynamicSmemBytes;
  launch->stream       = config.stream;
  launch->cooperative = launch->programmatic = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttributeValue& value = config.attrs[i].val;
    switch (config.attrs[i].id) {
      case cudaLaunchAttributeIgnore:
        break;
      case cudaLaunchAttributeCooperative:
        launch->cooperative = value.cooperative;
        break;
      case cudaLaunchAttributeClusterDimension:
        launch->cluster = {value.clusterDim.x, value.clusterDim.y, value.clusterDim.z};
        break;
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        launch->programmatic = value.programmaticStreamSerializationAllowed && device.major >= 9;
        break;
      default:
        return result(cudaErrorInvalidValue);
    }
  }
  const dim3 grid = launch->grid, block = launch->block, cluster = launch->cluster;
  const uint64_t ctas         = uint64_t(grid.x) * grid.y * grid.z;
  const uint64_t threads      = uint64_t(block.x) * block.y * block.z;
  const uint64_t cluster_size = uint64_t(cluster.x) * cluster.y * cluster.z;
  if (ctas == 0 || ctas > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > 1024) {
    return result(cudaErrorInvalidConfiguration);
  }
  if (launch->shared_bytes > size_t(most_shared_bytes(kernel))) {
    return result(cudaErrorInvalidValue);
  }
  if (cluster_size == 0 || cluster_size > 8 || (cluster_size > 1 && device.major < 9) ||
      grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) {
    return result(cudaErrorInvalidConfiguration);
  }
  int resident = 0;
  occupancy(&resident, kernel, int(threads), launch->shared_bytes);
  if (launch->cooperative && ctas > uint64_t(resident) * uint64_t(device.multiprocessors)) {
    return result(cudaErrorCooperativeLaunchTooLarge);
  }

  const bool overlaps =
      launch->programmatic && !queue.empty() && queue.back()->stream == launch->stream;
  if (!overlaps && !finish_all()) return cudaErrorLaunchFailure;
  launch->num_ctas    = int(ctas);
  launch->group_size  = launch->cooperative ? int(ctas) : int(cluster_size);
  launch->serial      = launches++;
  launched_ctas      += ctas;
  launch->first       = next_number;
  launch->base        = next_number;
  next_number        += uint32_t(ctas);
  if (overlaps) launch->previous = queue.back();
  for (int i = 0; i < int(ctas) / launch->group_size; ++i) launch->order.push_back(i);
  for (size_t i = launch->order.size(); i > 1; --i) {
    std::swap(launch->order[i - 1], launch->order[random_below(i)]);
  }
  queue.push_back(launch);
  const std::shared_ptr<Launch> oldest = queue.front();
  if (queue.size() > kQueue && !run_until(oldest.get())) return cudaErrorLaunchFailure;
  return cudaSuccess;
}

}  // namespace emulation

using namespace emulation;

// ---- The rest of the runtime API

namespace {
struct ErrorName {
  cudaError_t error;
  const char *name, *text;
};
#define ERROR(name, text) {name, #name, text}
const ErrorName kErrors[] = {
    ERROR(cudaSuccess, "no error"),
    ERROR(cudaErrorInvalidValue, "invalid argument"),
    ERROR(cudaErrorMemoryAllocation, "out of memory"),
    ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    ERROR(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime"),
    ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    ERROR(cudaErrorNoKernelImageForDevice, "no kernel image is available for the device"),
    ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    ERROR(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch"),
    ERROR(cudaErrorNotSupported, "operation not supported"),
};
#undef ERROR
const ErrorName& entry_of(cudaError_t e) {
  static const ErrorName unknown = {e, "cudaErrorUnknown", "unrecognized error code"};
  for (const ErrorName& entry : kErrors) {
    if (entry.error == e) return entry;
  }
  return unknown;
}
cudaError_t finish() {
  const std::lock_guard<std::recursive_mutex> lock(api);
  return finish_all() ? cudaSuccess : result(cudaErrorLaunchFailure);
}
}  // namespace

const char* cudaGetErrorName(cudaError_t e) { return entry_of(e).name; }
const char* cudaGetErrorString(cudaError_t e) { return entry_of(e).text; }
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t e = last_error;
  last_error          = failed ? cudaErrorLaunchFailure : cudaSuccess;
  return e;
}
cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return device.count ? cudaSuccess : result(cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int index) {
  return index >= 0 && index < device.count ? cudaSuccess : result(cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = device.count;
  return device.count ? cudaSuccess : result(cudaErrorNoDevice);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (index < 0 || index >= device.count) return result(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSharedBytes;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_bytes + 1024;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_bytes;
      break;
    case cudaDevAttrClusterLaunch:
      *value = device.major >= 9;
      break;
    default:
      return result(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return finish(); }
cudaError_t cudaDeviceSynchronize() { return finish(); }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  const cudaError_t e = finish();
  if (e == cudaSuccess) std::memset(to, value, bytes);
  return e;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  const cudaError_t e = finish();
  if (e == cudaSuccess) std::memmove(to, from, bytes);
  return e;
}

// ---- Control

const char* emulation_error() { return failed ? error.c_str() : nullptr; }

void emulation_reset(uint64_t new_seed) {
  const std::lock_guard<std::recursive_mutex> lock(api);
  abandon();
  failed        = false;
  last_error    = cudaSuccess;
  seed          = new_seed;
  launches      = 0;
  launched_ctas = 0;
  switches = first_switch = progress = 0;
  random_restart();
}

int emulation_synchronize() { return finish() == cudaSuccess ? 0 : 1; }

void emulation_register(void* address, size_t bytes) {
  const std::lock_guard<std::recursive_mutex> lock(api);
  if (bytes == 0) return;
  uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  uintptr_t end   = begin + bytes;
  const auto over = regions.upper_bound(begin);
  if (over != regions.end() && over->second.begin <= begin && over->second.end >= end) return;
  // One region of all that it overlaps; their records go, so nothing may be running.
  for (auto r = over; r != regions.end() && r->second.begin < end;) {
    finish_all();
    begin = std::min(begin, r->second.begin);
    end   = std::max(end, r->second.end);
    munmap(r->second.cells, r->second.cells_bytes);
    r = regions.erase(r);
  }
  const size_t cells_bytes = ((end - begin) / kGranule + 2) * sizeof(Cell);
  void* cells              = mmap(nullptr, cells_bytes, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (cells == MAP_FAILED) std::abort();
  regions[end] = {begin, end, static_cast<Cell*>(cells), cells_bytes};
}

void emulation_clear_regions() {
  const std::lock_guard<std::recursive_mutex> lock(api);
  finish_all();
  for (auto& r : regions) munmap(r.second.cells, r.second.cells_bytes);
  regions.clear();
  readers.resize(1);  // nothing runs, so all records were of regions
  free_readers = 0;
}

void emulation_set_device(int major, int minor, int multiprocessors, int shared_bytes) {
  device.major           = major;
  device.minor           = minor;
  device.multiprocessors = multiprocessors;
  device.shared_bytes    = shared_bytes;
}
void emulation_set_device_count(int count) { device.count = count; }
void emulation_set_switch_probability(double probability) { switch_probability = probability; }
void emulation_set_ctas_in_flight(int ctas) { ctas_in_flight = ctas; }
void emulation_set_switch_limit(uint64_t limit) { switch_limit = limit; }
void emulation_set_collectives_order(int yes) { collectives_order = yes; }

int emulation_num_sites() { return int(sites.size()); }
const char* emulation_site(int index) {
  return size_t(index) < sites.size() ? sites[size_t(index)]->c_str() : nullptr;
}
void emulation_disable_site(const char* site) {
  disabled_site   = site ? site : "";
  disabled_number = -1;
  for (size_t i = 0; i < sites.size(); ++i) {
    if (*sites[i] == disabled_site) disabled_number = int(i);
  }
}

uint64_t emulation_num_switches() { return switches; }
uint64_t emulation_num_ctas() { return launched_ctas; }
