// The texts of all slots, from which drafts are looked up. vllmlite/runner/propose/reference.py is the specification.
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "propose/suffix_automaton.hpp"

namespace vllmlite {

// Ids, which are indexed when drafts are first wanted.
class IndexedText {
 public:
  IndexedText(int longest, bool counts) : automaton_(longest, counts) {}

  void append(std::span<const std::int32_t> ids) { ids_.insert(ids_.end(), ids.begin(), ids.end()); }
  std::span<const std::int32_t> ids() const { return ids_; }
  const SuffixAutomaton& indexed();

 private:
  std::vector<std::int32_t> ids_;
  std::size_t num_indexed_ = 0;
  SuffixAutomaton automaton_;
};

// Base of the kinds of drafts: the sequences of all slots. Drafts are appended to `drafts`.
class Sequences {
 public:
  explicit Sequences(int max_slots) : slots_(static_cast<std::size_t>(max_slots)) {}
  virtual ~Sequences() = default;
  Sequences(const Sequences&) = delete;
  Sequences& operator=(const Sequences&) = delete;

  // The number of sequences that have been admitted to slots.
  std::int64_t num_admissions() const { return num_admissions_; }
  // Begins a sequence; `num_prompt` of the ids are its prompt.
  void admit(int slot, std::vector<std::int32_t> ids, std::size_t num_prompt);
  // Appends to the sequence of a slot, unless it was admitted after the first `admissions` ones; returns whether it
  // did.
  bool append(int slot, std::int64_t admissions, std::span<const std::int32_t> ids);
  // At most `count` drafts for the sequence of a slot, to which append() has just appended.
  virtual std::vector<std::int32_t> draft(int slot, int count) = 0;

 protected:
  struct Slot {
    std::int64_t admission = 0;
    std::size_t num_prompt = 0;
    std::vector<IndexedText> text;  // one, or none before the first admission
  };
  virtual IndexedText empty() const = 0;
  virtual void ended(const Slot&) {}
  Slot& at(int slot);

 private:
  std::vector<Slot> slots_;
  std::int64_t num_admissions_ = 0;
};

// Drafts the ids after the first occurrence of the longest n-gram that ends the text.
class NgramSequences final : public Sequences {
 public:
  NgramSequences(int max_slots, int shortest, int longest)
      : Sequences(max_slots), shortest_(shortest), longest_(longest) {}
  std::vector<std::int32_t> draft(int slot, int count) override;

 private:
  IndexedText empty() const override { return {longest_, false}; }
  int shortest_, longest_;
};

// Drafts the most frequent continuation of the end of the text, in the text itself or in outputs of earlier sequences.
class SuffixSequences final : public Sequences {
 public:
  // Contexts and drafts together have at most `depth` ids. The last `earlier` outputs are kept, or fewer: outputs are
  // dropped by halves.
  SuffixSequences(int max_slots, int depth, double factor, double least_probability, int earlier)
      : Sequences(max_slots),
        depth_(depth),
        factor_(factor),
        least_probability_(least_probability),
        earlier_(earlier) {}
  std::vector<std::int32_t> draft(int slot, int count) override;

 private:
  IndexedText empty() const override { return {depth_ - 1, true}; }
  void ended(const Slot& slot) override;

  int depth_;
  double factor_, least_probability_;
  int earlier_;
  std::deque<IndexedText> outputs_;  // the newer half of the earlier outputs, then the older one
  int num_newer_ = 0;
};

}  // namespace vllmlite
