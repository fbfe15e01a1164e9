#include "cpu/team.hpp"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/pause.hpp"

namespace vllmlite::cpu {

namespace {

constexpr int kSpins = 4000;  // a few microseconds: the usual wait between two threads of the team
constexpr int kYields = 100;  // how often an idle thread yields before it sleeps

// Binds the calling thread. Failure is ignored: it costs speed only, and whoever forbids it, such as a container, has
// placed the process already.
void bind([[maybe_unused]] const std::vector<int>& cpus) {
#if defined(__linux__)
  if (cpus.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus)
    if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
  (void)pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#endif
}

}  // namespace

void Worker::Free::operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{64}); }

std::int64_t Worker::take() { return team_->next_.fetch_add(1, std::memory_order_relaxed); }

Team::Team(std::vector<std::vector<int>> places) : workers_(places.size()) {
  for (Worker& worker : workers_) worker.team_ = this;
  threads_.reserve(workers_.size() - 1);
  try {
    for (std::size_t index = 1; index < places.size(); ++index)
      threads_.emplace_back(
          [this, index, place = std::move(places[index])] { member(static_cast<int>(index), place); });
  } catch (const std::exception& error) {
    dismiss();  // or joining the threads already started would wait forever
    throw std::runtime_error("thread " + std::to_string(threads_.size() + 1) + " of " + std::to_string(size() - 1) +
                             " cannot be started: " + error.what());
  }
}

Team::~Team() { dismiss(); }

void Team::dismiss() {
  stop_ = true;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
}

void Team::reserve(std::size_t bytes) {
  if (bytes <= scratch_bytes_) return;
  for (Worker& worker : workers_)
    worker.scratch_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64})));
  scratch_bytes_ = bytes;
}

void Team::run(std::span<const Phase> phases) {
  if (phases.empty()) return;
  phases_ = phases;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  work(workers_[0]);
}

void Team::work(Worker& worker) {
  for (const Phase& phase : phases_) {
    phase(worker);
    meet();
  }
}

void Team::member(int index, const std::vector<int>& place) {
  bind(place);
  for (std::uint32_t seen = 0;;) {
    for (int i = 0; i < kSpins && round_.load(std::memory_order_acquire) == seen; ++i) pause();
    for (int i = 0; i < kYields && round_.load(std::memory_order_acquire) == seen; ++i) std::this_thread::yield();
    round_.wait(seen, std::memory_order_acquire);
    // No round can be missed: the caller finishes one only after every thread has reached its end.
    seen = round_.load(std::memory_order_acquire);
    if (stop_) return;
    work(workers_[static_cast<std::size_t>(index)]);
  }
}

void Team::meet() {
  const std::uint32_t meeting = meeting_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    meeting_.store(meeting + 1, std::memory_order_release);
    return;
  }
  for (int i = 0; meeting_.load(std::memory_order_acquire) == meeting; ++i) {
    if (i < kSpins)
      pause();
    else
      std::this_thread::yield();
  }
}

}  // namespace vllmlite::cpu
