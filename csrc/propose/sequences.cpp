#include "propose/sequences.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace vllmlite {

namespace {

constexpr std::int32_t kEnd = -1;                  // stands after each earlier output
constexpr std::size_t kMostEarlierIds = 1u << 20;  // of a half of the earlier outputs: 150 MB

}  // namespace

const SuffixAutomaton& IndexedText::indexed() {
  for (; num_indexed_ < ids_.size(); ++num_indexed_) automaton_.append(ids_[num_indexed_]);
  return automaton_;
}

Sequences::Slot& Sequences::at(int slot) {
  if (slot < 0 || static_cast<std::size_t>(slot) >= slots_.size())
    throw std::out_of_range("there is no slot " + std::to_string(slot));
  return slots_[static_cast<std::size_t>(slot)];
}

void Sequences::admit(int slot, std::vector<std::int32_t> ids, std::size_t num_prompt) {
  Slot& admitted = at(slot);
  ended(admitted);
  admitted = {++num_admissions_, num_prompt, {}};
  admitted.text.push_back(empty());
  admitted.text.front().append(ids);
}

bool Sequences::append(int slot, std::int64_t admissions, std::span<const std::int32_t> ids) {
  Slot& found = at(slot);
  if (found.text.empty() || found.admission > admissions) return false;
  found.text.front().append(ids);
  return true;
}

std::vector<std::int32_t> NgramSequences::draft(int slot, int count) {
  IndexedText& text = at(slot).text.front();
  const auto first = static_cast<std::size_t>(text.indexed().after_first_match(shortest_));
  const auto ids = text.ids();
  const auto found = ids.subspan(first, std::min(ids.size() - first, static_cast<std::size_t>(count)));
  return {found.begin(), found.end()};
}

std::vector<std::int32_t> SuffixSequences::draft(int slot, int count) {
  IndexedText& text = at(slot).text.front();
  const DraftLimits limits{count, factor_, least_probability_};
  Draft best = text.indexed().draft(limits);
  for (IndexedText& outputs : outputs_)
    if (Draft other = outputs.indexed().draft(text.ids(), limits); other.score > best.score) best = std::move(other);
  return std::move(best.ids);
}

void SuffixSequences::ended(const Slot& slot) {
  if (earlier_ == 0 || slot.text.empty() || slot.text.front().ids().size() <= slot.num_prompt) return;
  if (outputs_.empty() || num_newer_ >= std::max(1, earlier_ / 2) || outputs_.front().ids().size() >= kMostEarlierIds) {
    if (outputs_.size() == 2) outputs_.pop_back();
    if (earlier_ == 1) outputs_.clear();
    outputs_.push_front(empty());
    num_newer_ = 0;
  }
  outputs_.front().append(slot.text.front().ids().subspan(slot.num_prompt));
  outputs_.front().append({&kEnd, 1});
  ++num_newer_;
}

}  // namespace vllmlite
