// Runs the tiles of many layers over threads, each layer's stages one after another, without a barrier between them.
#pragma once

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>
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

// A free thread takes a tile of the first layer that has one ready, so that a layer's second reading follows its first
// at once, and goes on to the next layer only while others still hold tiles that the stage waits for. Where a stage
// reads what the one before it read, a thread takes its own tiles again, the last one first: what its cache still
// holds. A thread holds one tile at a time and waits only where every tile that is left waits for one that is held,
// so whatever the number of threads, somebody works.
class Schedule {
 public:
  explicit Schedule(int64_t layers) : layers_(layers) {}

  // The next stage of a layer; layers are added largest first, so that the small ones fill the gaps at the end.
  // again: tile t reads what tile t of the stage before read.
  void add_stage(int64_t layer, int64_t tiles, bool again = false) {
    layers_[layer].stages.push_back({tiles, again});
    unclaimed_ += tiles;
  }

  // run(layer, stage, tile, thread) for every tile; finish(layer, stage, thread) once, after the last tile of a stage.
  template <class Run, class Finish>
  void run(int threads, const Run& run, const Finish& finish) {
    for (Layer& layer : layers_) layer.begin(threads);
    auto work = [&](int thread) {
      for (Tile t; draw(thread, t);) {
        run(t.layer, t.stage, t.tile, thread);
        if (layers_[t.layer].unfinished.fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
        finish(t.layer, t.stage, thread);
        advance(t.layer);
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
  struct Stage {
    int64_t tiles;
    bool again;
  };
  struct Tile {
    int64_t layer;
    int stage;
    int64_t tile;
  };
  struct Claim {
    int64_t tile;
    int64_t earlier;  // of the same thread; -1: none
    bool taken;
  };
  // The tiles of a stage in the order in which threads took them.
  struct Claims {
    std::vector<Claim> all;
    std::vector<int64_t> last;  // of each thread
    int64_t left = 0, oldest = 0;

    void clear() {
      all.clear();
      std::fill(last.begin(), last.end(), -1);
      left = oldest = 0;
    }
    void add(int64_t tile, int thread) {
      all.push_back({tile, last[thread], false});
      last[thread] = int64_t(all.size()) - 1;
      ++left;
    }
    // The thread's own last one, or the oldest of another's, which no cache holds any more.
    int64_t take(int thread) {
      int64_t i = last[thread];
      while (i >= 0 && all[i].taken) i = all[i].earlier;
      last[thread] = i < 0 ? -1 : all[i].earlier;
      if (i < 0) {
        while (all[oldest].taken) ++oldest;
        i = oldest;
      }
      all[i].taken = true;
      --left;
      return all[i].tile;
    }
  };
  struct Layer {
    std::vector<Stage> stages;
    int stage = 0;
    int64_t unclaimed = 0;
    std::atomic<int64_t> unfinished{0};
    Claims claims, before;  // of this stage, and of the last one where this reads it again

    // Memory is taken here: threads have nobody to tell that there is none.
    void begin(int threads) {
      for (size_t i = 0; i < stages.size(); ++i) {
        if (!stages[i].again) continue;
        for (Claims* of : {&claims, &before}) of->all.reserve(size_t(stages[i].tiles)), of->last.assign(threads, -1);
      }
      begin_stage();
    }

    void begin_stage() {
      unclaimed = stages[stage].tiles;
      unfinished.store(unclaimed, std::memory_order_relaxed);  // nobody holds a tile of this layer
      before.clear();
      if (stages[stage].again) std::swap(before, claims);
      claims.clear();
    }

    int64_t claim(int thread) {
      int64_t tile = stages[stage].tiles - unclaimed--;
      if (before.left > 0) tile = before.take(thread);
      if (stage + 1 < int(stages.size()) && stages[stage + 1].again) claims.add(tile, thread);
      return tile;
    }
  };

  // False when nothing is left to begin.
  bool draw(int thread, Tile& t) {
    for (int spins = 0;; pause(++spins)) {
      const int64_t seen = advances_.load(std::memory_order_acquire);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (unclaimed_ == 0) return false;
        for (int64_t l = first_; l < int64_t(layers_.size()); ++l) {
          Layer& layer = layers_[l];
          if (layer.unclaimed == 0) {
            if (l == first_ && layer.stage + 1 == int(layer.stages.size())) ++first_;
            continue;
          }
          --unclaimed_;
          t = {l, layer.stage, layer.claim(thread)};
          return true;
        }
      }
      while (advances_.load(std::memory_order_acquire) == seen) pause(++spins);
    }
  }

  void advance(int64_t l) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      Layer& layer = layers_[l];
      if (layer.stage + 1 < int(layer.stages.size())) {
        ++layer.stage;
        layer.begin_stage();
      }
    }
    advances_.fetch_add(1, std::memory_order_release);
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

  std::vector<Layer> layers_;
  int64_t first_ = 0, unclaimed_ = 0;
  std::atomic<int64_t> advances_{0};
  std::mutex mutex_;
};

}  // namespace BSSN_ISA
}  // namespace bssn
