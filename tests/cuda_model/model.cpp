// Runs launches on the model of device.cuh, behind the interface that the bindings know.
//
// Environment: BSSN_MODEL_SEED, of the interleaving (default 0); BSSN_MODEL_RESIDENT, programs that run at once (2).

#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/backward.cuh"
#include "cuda/forward.cuh"
#include "cuda/normalize.h"

namespace bssn {
namespace cuda {
namespace model {
namespace {

// Not a power of two, or the stacks of all threads would compete for the same lines of the cache.
constexpr size_t kStack = (64 << 10) + 17 * 64;

struct Copy {
  void* to;
  const void* from;
  bool there;
};

struct Program;

struct Thread {
  ucontext_t start;
  jmp_buf at;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Program* program = nullptr;
  int number = 0;
  bool started = false;
  std::vector<Copy> open;                   // copies since the last commit
  std::deque<std::vector<Copy>> committed;  // groups not yet done
};

// Threads that have come to a meeting wait until all have.
struct Meeting {
  int expected = 0;
  std::vector<Thread*> waiting;
};

struct Program {
  std::vector<char> shared;
  Meeting block, warps[kWarps];
  uint64_t values[kWarps][2][32];
  int generation[kWarps];
  Thread threads[kThreads];
  int running = 0;
};

uint64_t state = 1;
uint64_t random_number() {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

std::function<void()> body;
std::vector<Thread*> ready;
Thread* current = nullptr;
jmp_buf scheduler;
long idle = 0;  // pauses since anything else happened
std::string failure;

void yield() {
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

void enter() {
  body();
  Thread* self = current;
  for (const auto& group : self->committed)
    if (!group.empty()) failure = "a thread left with copies that nobody waited for";
  --self->program->running;
  idle = 0;
  _longjmp(scheduler, 1);
}

void meet(Meeting& meeting) {
  meeting.waiting.push_back(current);
  if (int(meeting.waiting.size()) == meeting.expected) {
    idle = 0;
    for (Thread* thread : meeting.waiting) ready.push_back(thread);
    meeting.waiting.clear();
  }
  yield();
}

void perform(std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.there)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
  group.clear();
}

void begin(Program& program, size_t shared) {
  program.shared.assign(shared + 16, char(0xff));
  program.running = kThreads;
  program.block.expected = kThreads;
  for (int w = 0; w < kWarps; ++w) program.warps[w].expected = 32, program.generation[w] = 0;
  for (int i = 0; i < kThreads; ++i) {
    Thread& thread = program.threads[i];
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, enter, 0);
    thread.started = false;
    thread.program = &program, thread.number = i;
    thread.open.clear(), thread.committed.clear();
    ready.push_back(&thread);
  }
}

long setting(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atol(text) : otherwise;
}

// Runs a thread until it waits or ends. A frame of its own, whose variables no jump can spoil.
[[gnu::noinline]] void resume(Thread* thread) {
  current = thread;
  if (_setjmp(scheduler)) return;
  if (thread->started) _longjmp(thread->at, 1);
  thread->started = true;
  setcontext(&thread->start);
}

// `programs` programs, at most `resident` at once, on one real thread.
void run(int programs, size_t shared, std::function<void()> work) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  static std::vector<std::unique_ptr<Program>> pool;
  const size_t resident = size_t(std::max(1L, std::min(long(programs), setting("BSSN_MODEL_RESIDENT", 2))));
  while (pool.size() < resident) pool.emplace_back(new Program);
  state = uint64_t(setting("BSSN_MODEL_SEED", 0)) * 2654435761u + 88172645463325252u;
  body = std::move(work);
  ready.clear();
  failure.clear();
  idle = 0;
  int begun = 0, alive = 0;
  std::vector<bool> busy(resident, false);
  while (true) {
    for (size_t i = 0; i < resident; ++i) {
      if (busy[i] && pool[i]->running == 0) busy[i] = false, --alive;
      if (!busy[i] && begun < programs) begin(*pool[i], shared), busy[i] = true, ++begun, ++alive;
    }
    if (alive == 0 || !failure.empty()) break;
    Thread* thread;
    do {  // until a program ends
      if (ready.empty()) {
        failure = "deadlock: threads wait at a barrier that others do not reach";
        break;
      }
      if (idle > 64 * long(ready.size()) + 1000) {
        failure = "deadlock: every program waits for a counter that nobody raises";
        break;
      }
      const size_t pick = random_number() % ready.size();
      thread = ready[pick];
      ready[pick] = ready.back();
      ready.pop_back();
      resume(thread);
    } while (thread->program->running > 0 && failure.empty());
  }
  body = nullptr;
  for (auto& program : pool) {
    program->block.waiting.clear();
    for (Meeting& warp : program->warps) warp.waiting.clear();
  }
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace

int thread() { return current->number; }
char* shared_memory() {
  char* p = current->program->shared.data();
  return p + (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16;
}
void barrier() { meet(current->program->block); }
void warp_barrier() { meet(current->program->warps[current->number / 32]); }
uint64_t exchange(uint64_t mine, int mask) {
  Program& program = *current->program;
  const int w = current->number / 32, lane = current->number % 32;
  // Two boards in turn: nobody is two exchanges ahead of another lane.
  auto& board = program.values[w][program.generation[w] & 1];
  board[lane] = mine;
  const bool last = int(program.warps[w].waiting.size()) == 31;
  if (last) ++program.generation[w];
  meet(program.warps[w]);
  return board[lane ^ mask];
}
void event() {
  idle = 0;
  if (random_number() & 1) {
    ready.push_back(current);
    yield();
  }
}
void pause() {
  ++idle;
  ready.push_back(current);
  yield();
}
void copy(void* to, const void* from, bool there) {
  std::memset(to, 0xff, 16);
  current->open.push_back({to, from, there});
}
void commit() {
  current->committed.push_back(std::move(current->open));
  current->open.clear();
  if (random_number() & 1) perform(current->committed.back());  // early, or as late as the wait allows
}
void wait(int pending) {
  while (int(current->committed.size()) > pending) {
    perform(current->committed.front());
    current->committed.pop_front();
  }
}

}  // namespace model

namespace {

// BSSN_MODEL_FLOAT: of float32 alone, for faults that are built in one by one.
template <class F>
void with_type_and_roles(DType dtype, bool both, F f) {
#if defined(BSSN_MODEL_FLOAT)
  if (dtype != DType::f32 || !both) throw std::runtime_error("this model has float32 and both roles alone");
  return f(float(), std::true_type());
#endif
  with_type(dtype, [&](auto type) {
    if (both)
      f(type, std::true_type());
    else
      f(type, std::false_type());
  });
}

Tensors tensors_of(const Call& call) {
  Tensors tensors{};
  const bool few = call.tensors.size() <= size_t(kTensors);
  std::copy(call.tensors.begin(), call.tensors.end(), few ? tensors.at : call.table);
  tensors.table = few ? nullptr : call.table;
  return tensors;
}

}  // namespace

void forward(const Call& call) {
  const Tensors outs = tensors_of(call);
  with_type_and_roles(call.weight_dtype, call.both, [&](auto type, auto both) {
    using T = decltype(type);
    model::run(call.launch.n_programs, sizeof(Shared<T, both.value>),
               [&] { forward_program<T, both.value>(call.launch, outs); });
  });
}

void backward(const Call& call) {
  const Tensors tensors = tensors_of(call);
  with_type_and_roles(call.weight_dtype, call.both, [&](auto type, auto both) {
    using T = decltype(type);
    model::run(call.launch.n_programs, sizeof(Shared<T, both.value>),
               [&] { backward_program<T, both.value>(call.launch, tensors, int(call.tensors.size() / 2)); });
  });
}

void store(const StoreCall& call) {
  for (int i = 0; i < call.n; ++i)
    model::run(1, 0, [&] {
      if (call.wide)
        store_part<double>(call.parts[i], call.addresses, call.saved);
      else
        store_part<float>(call.parts[i], call.addresses, call.saved);
    });
}

int resident_programs(bool, DType, bool, int) { return int(model::setting("BSSN_MODEL_RESIDENT", 2)); }

std::string missing_code(int) { return ""; }

}  // namespace cuda
}  // namespace bssn
