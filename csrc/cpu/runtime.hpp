// Ops are not run when they are issued but appended to a list, which the thread team goes through when somebody wants
// to see a result. A graph is such a list, kept.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/arena.hpp"
#include "cpu/kernels.hpp"
#include "cpu/team.hpp"

namespace vllmlite::cpu {

// A list of phases and what they need to be run again.
struct Recording {
  std::vector<Phase> phases;
  std::vector<std::shared_ptr<void>> keeps;
  std::shared_ptr<Arena> arena;
};

// The kernels' name of a float dtype, and back. TypeError for others.
Float float_of(DType dtype);
DType dtype_of(Float type);

class Runtime {
 public:
  // Kernels of `isa` ("auto": the best), a thread for each of `places` (as Team has them), and a model of dense weights
  // of `dtype`.
  Runtime(const std::string& isa, std::vector<std::vector<int>> places, DType dtype);

  const Kernels& kernels() const { return kernels_; }
  int threads() const { return team_.size(); }

  // What ops that feed a product return: the dtype in which products of the model's weights take their input.
  DType product_input() const { return product_input_; }

  // A tensor for an op's result.
  Tensor make(std::vector<std::int64_t> shape, DType dtype) { return arena_->make(std::move(shape), dtype); }

  // Keeps memory alive until the phases that use it have run, or for as long as a recording of them lives.
  void keep(const Tensor& tensor);
  void keep(std::shared_ptr<void> owner) { pending_.keeps.push_back(std::move(owner)); }

  void reserve_scratch(std::size_t bytes) { team_.reserve(bytes); }
  void issue(Phase phase) { pending_.phases.push_back(std::move(phase)); }

  // Runs what is pending.
  void flush();

  // Between the two, what is issued is kept and what is made comes from the arena of all recordings, which never run at
  // the same time and leave each other nothing but their results. The second runs it.
  void begin_recording();
  std::shared_ptr<Recording> end_recording();
  void abandon_recording();
  void replay(const Recording& recording);

 private:
  const Kernels& kernels_;
  DType product_input_;
  Team team_;
  std::shared_ptr<Arena> arena_ = std::make_shared<Arena>();
  std::shared_ptr<Arena> recordings_arena_ = std::make_shared<Arena>();
  std::shared_ptr<Arena> lasting_arena_;  // while recording
  Recording pending_;
};

}  // namespace vllmlite::cpu
