// An issued op does not run at once: its phases join a list, which the thread team runs when a result is needed. A
// graph is such a list that is kept.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/arena.hpp"
#include "cpu/kernels.hpp"
#include "cpu/team.hpp"

namespace vllmlite::cpu {

// A list of phases and the memory that they need to run again.
struct Recording {
  std::vector<Phase> phases;
  std::vector<std::shared_ptr<void>> keeps;
  std::shared_ptr<Arena> arena;
};

// Conversions between a float dtype and the kernels' name for it. TypeError for other dtypes.
Float float_of(DType dtype);
DType dtype_of(Float type);

class Runtime {
 public:
  // Uses the kernels of `isa` ("auto": the best), one thread for each of `places` (see Team); `dtype` is that of the
  // model's dense weights.
  Runtime(const std::string& isa, std::vector<std::vector<int>> places, DType dtype);

  const Kernels& kernels() const { return kernels_; }
  int threads() const { return team_.size(); }

  // Dtype in which products with the model's weights take their input, and so what ops before a product return.
  DType product_input() const { return product_input_; }

  // A tensor for an op's result.
  Tensor make(std::vector<std::int64_t> shape, DType dtype) { return arena_->make(std::move(shape), dtype); }

  // Keeps memory alive until the phases that use it have run, or for as long as a recording of them lives.
  void keep(const Tensor& tensor);
  void keep(std::shared_ptr<void> owner) { pending_.keeps.push_back(std::move(owner)); }

  void reserve_scratch(std::size_t bytes) { team_.reserve(bytes); }
  void issue(Phase phase) { pending_.phases.push_back(std::move(phase)); }

  // Runs the pending phases.
  void flush();

  // Gives memory that no tensor uses back to the system, after flush().
  void discard_free();

  // Between begin_recording and end_recording, issued phases are kept, and results come from an arena that all
  // recordings share: recordings never run at the same time, and only their results outlive them. end_recording also
  // runs them once.
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
