// A persistent team of threads that runs a list of phases together. The calling thread is its first member; the others
// sleep between lists.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <thread>
#include <vector>

namespace vllmlite::cpu {

class Team;

// One thread of the team, as a phase sees it.
class Worker {
 public:
  // The next task number; each is handed out once per phase.
  std::int64_t take();

  // Takes the tasks below `count` and calls body(task, following) for each. `following` is the thread's next task, or
  // -1 if there is none; it is taken early, so that the body can prefetch its data.
  template <typename Body>
  void take_ahead(std::int64_t count, Body body) {
    for (std::int64_t task = take(); task < count;) {
      const std::int64_t following = take();
      body(task, following < count ? following : -1);
      task = following;
    }
  }

  // Memory of this thread alone, at least as large as Team::reserve asked for, 64-byte aligned, with undefined
  // contents.
  std::byte* scratch() const { return scratch_.get(); }

 private:
  friend class Team;
  struct Free {
    void operator()(std::byte* memory) const;
  };

  Team* team_ = nullptr;
  std::unique_ptr<std::byte, Free> scratch_;
};

// A function that every thread of the team runs, sharing the tasks by Worker::take. It must not throw.
using Phase = std::function<void(Worker&)>;

class Team {
 public:
  // One thread for each of `places`, the CPUs to which it is bound (none: any). The first is the calling thread, which
  // is not bound. Throws std::runtime_error if a thread cannot be started.
  explicit Team(std::vector<std::vector<int>> places);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return static_cast<int>(workers_.size()); }

  // Gives every thread scratch memory of at least `bytes`. Must not be called while phases run.
  void reserve(std::size_t bytes);

  // Runs the phases in order; each begins when every thread has finished the one before.
  void run(std::span<const Phase> phases);

 private:
  friend class Worker;

  void work(Worker& worker);
  void member(int index, const std::vector<int>& place);
  void meet();
  // Makes the threads end.
  void dismiss();

  std::vector<Worker> workers_;
  std::size_t scratch_bytes_ = 0;
  std::span<const Phase> phases_;
  bool stop_ = false;
  alignas(64) std::atomic<std::uint32_t> round_{0};
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> meeting_{0};
  std::vector<std::jthread> threads_;
};

}  // namespace vllmlite::cpu
