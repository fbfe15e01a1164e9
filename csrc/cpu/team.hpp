// A persistent team of threads that goes through a list of phases together. The caller is its first member; the others
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

// A member, as a phase sees it.
class Worker {
 public:
  // The next task's number, each one given out once in a phase.
  std::int64_t take();

  // Takes tasks below `count` and does each by body(task, following). The following one, -1 where there is none, is
  // taken early, so that what it reads can be fetched while this one computes.
  template <typename Body>
  void take_ahead(std::int64_t count, Body body) {
    for (std::int64_t task = take(); task < count;) {
      const std::int64_t following = take();
      body(task, following < count ? following : -1);
      task = following;
    }
  }

  // Private memory of at least what Team::reserve asked for, 64-byte aligned, contents undefined.
  std::byte* scratch() const { return scratch_.get(); }

 private:
  friend class Team;
  struct Free {
    void operator()(std::byte* memory) const;
  };

  Team* team_ = nullptr;
  std::unique_ptr<std::byte, Free> scratch_;
};

// What every member runs, sharing tasks by Worker::take. Must not throw.
using Phase = std::function<void(Worker&)>;

class Team {
 public:
  // As many members as there are `places`: the CPUs that each is bound to, none for any. The caller, who is the first
  // member, stays where it is. Throws std::runtime_error if the system starts no more threads.
  explicit Team(std::vector<std::vector<int>> places);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return static_cast<int>(workers_.size()); }

  // Gives every member scratch memory of at least `bytes`. Not while phases run.
  void reserve(std::size_t bytes);

  // Runs the phases in order; each begins when every member is through with the one before.
  void run(std::span<const Phase> phases);

 private:
  friend class Worker;

  void work(Worker& worker);
  void member(int index, const std::vector<int>& place);
  void meet();
  // Lets every member end.
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
