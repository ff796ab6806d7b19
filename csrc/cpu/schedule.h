// Runs the tiles of many layers over threads, each layer's stages one after another, without a barrier between them.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

// The parallel region by hand, in the OpenMP runtime that torch has loaded: LLVM's has this entry too, and clang's own
// code for a pragma would ask for entries that GNU's has not.
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
extern "C" int omp_get_thread_num();

namespace bssn {
namespace BSSN_ISA {

// Tickets are drawn in the order of one list. A stage waits only for the stage before it of the same layer, whose
// tickets are all earlier in the list, and a thread finishes the tile it holds before it draws again: so whatever the
// number of threads, the smallest unfinished ticket is always being worked on.
class Schedule {
 public:
  explicit Schedule(int64_t layers) : layers_(layers) {}

  // The next stage of a layer; layers are added largest first, so that the small ones fill the gaps at the end.
  void add_stage(int64_t layer, int64_t tiles) {
    if (int64_t(tiles_.size()) <= layer) tiles_.resize(layer + 1);
    tiles_[layer].push_back(tiles);
  }

  // run(layer, stage, tile, thread) for every tile; finish(layer, stage, thread) once, after the last tile of a stage.
  template <class Run, class Finish>
  void run(int threads, const Run& run, const Finish& finish) {
    build();
    const int64_t n = int64_t(tickets_.size());
    std::atomic<int64_t> next{0};
    auto work = [&](int thread) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
        const Ticket& t = tickets_[i];
        State& state = states_[t.layer];
        for (int spins = 0; state.ready.load(std::memory_order_acquire) < t.stage;) pause(++spins);
        run(t.layer, t.stage, t.tile, thread);
        if (state.left[t.stage].fetch_sub(1, std::memory_order_acq_rel) == 1) {
          finish(t.layer, t.stage, thread);
          state.ready.store(t.stage + 1, std::memory_order_release);
        }
      }
    };
    if (threads == 1) {  // no OpenMP call at all: in a forked child its pool is gone
      work(0);
      return;
    }
    using Work = decltype(work);
    GOMP_parallel([](void* w) { (*static_cast<Work*>(w))(omp_get_thread_num()); }, &work, unsigned(threads), 0);
  }

 private:
  struct Ticket {
    int32_t layer, stage;
    int64_t tile;
  };
  struct State {
    std::atomic<int> ready{0};
    std::unique_ptr<std::atomic<int64_t>[]> left;
  };

  // Stage s of layer l comes after stage s - 1 of layer l + 1: while one layer's last tiles finish, the next one's
  // first are at work, and a layer's second reading still follows its first closely enough to find it in cache.
  void build() {
    states_ = std::vector<State>(layers_);
    int64_t waves = 0, most = 0;
    for (int64_t l = 0; l < layers_; ++l) {
      const int64_t stages = int64_t(tiles_[l].size());
      states_[l].left.reset(new std::atomic<int64_t>[stages]);
      for (int64_t s = 0; s < stages; ++s) states_[l].left[s] = tiles_[l][s];
      waves = waves > l + stages ? waves : l + stages;
      most = most > stages ? most : stages;
    }
    for (int64_t wave = 0; wave < waves; ++wave) {
      for (int64_t l = wave < layers_ ? wave : layers_ - 1; l >= 0; --l) {
        const int64_t s = wave - l;
        if (s >= most) break;
        if (s >= int64_t(tiles_[l].size())) continue;
        for (int64_t t = 0; t < tiles_[l][s]; ++t) tickets_.push_back({int32_t(l), int32_t(s), t});
      }
    }
  }

  static void pause(int spins) {
    if (spins % 64 == 0) {
      sched_yield();
    } else {
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }

  int64_t layers_;
  std::vector<std::vector<int64_t>> tiles_;
  std::vector<State> states_;
  std::vector<Ticket> tickets_;
};

}  // namespace BSSN_ISA
}  // namespace bssn
