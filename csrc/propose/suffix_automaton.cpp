#include "propose/suffix_automaton.hpp"

#include <algorithm>
#include <utility>

namespace vllmlite {

SuffixAutomaton::SuffixAutomaton(int longest, bool counts)
    : longest_(longest), tracked_(longest + (counts ? 1 : 0)), counts_(counts), states_(1), table_(16) {}

std::size_t SuffixAutomaton::bucket(std::int32_t state, std::int32_t id) const {
  const std::uint64_t mixed =
      static_cast<std::uint32_t>(state) * 0x9E3779B97F4A7C15u + static_cast<std::uint32_t>(id) * 0xC2B2AE3D27D4EB4Fu;
  return static_cast<std::size_t>(mixed >> 24) & (table_.size() - 1);
}

std::int32_t SuffixAutomaton::find(std::int32_t state, std::int32_t id) const {
  const State& source = states_[static_cast<std::size_t>(state)];
  if (source.num_edges <= kListed) {
    std::int32_t edge = source.edges;
    while (edge >= 0 && edges_[static_cast<std::size_t>(edge)].id != id)
      edge = edges_[static_cast<std::size_t>(edge)].next;
    return edge;
  }
  for (std::size_t at = bucket(state, id); table_[at] != 0; at = (at + 1) & (table_.size() - 1)) {
    const Edge& edge = edges_[static_cast<std::size_t>(table_[at] - 1)];
    if (edge.source == state && edge.id == id) return table_[at] - 1;
  }
  return -1;
}

void SuffixAutomaton::hash(std::int32_t edge) {
  if (2 * ++num_hashed_ > table_.size()) {
    std::vector<std::int32_t> smaller(table_.size() * 2);
    table_.swap(smaller);
    for (const std::int32_t entry : smaller)
      if (entry != 0) place(entry);
  }
  place(edge + 1);
}

void SuffixAutomaton::place(std::int32_t entry) {
  const Edge& edge = edges_[static_cast<std::size_t>(entry - 1)];
  std::size_t at = bucket(edge.source, edge.id);
  while (table_[at] != 0) at = (at + 1) & (table_.size() - 1);
  table_[at] = entry;
}

void SuffixAutomaton::add_edge(std::int32_t state, std::int32_t id, std::int32_t target) {
  State& source = states_[static_cast<std::size_t>(state)];
  const auto added = static_cast<std::int32_t>(edges_.size());
  edges_.push_back({state, id, target, source.edges});
  source.edges = added;
  if (++source.num_edges <= kListed) return;
  if (source.num_edges > kListed + 1) return hash(added);
  for (std::int32_t edge = added; edge >= 0; edge = edges_[static_cast<std::size_t>(edge)].next) hash(edge);
}

std::int32_t SuffixAutomaton::clone(std::int32_t state, std::int32_t length) {
  const auto copy = static_cast<std::int32_t>(states_.size());
  State made = states_[static_cast<std::size_t>(state)];
  made.length = length;
  made.edges = -1;
  made.num_edges = 0;
  states_.push_back(made);
  for (std::int32_t edge = states_[static_cast<std::size_t>(state)].edges; edge >= 0;) {
    const Edge copied = edges_[static_cast<std::size_t>(edge)];
    if (made.best == edge) states_[static_cast<std::size_t>(copy)].best = static_cast<std::int32_t>(edges_.size());
    add_edge(copy, copied.id, copied.target);
    edge = copied.next;
  }
  states_[static_cast<std::size_t>(state)].link = copy;
  return copy;
}

// Blumer et al. (1985): adds the state of the longer sequence, and splits that of its longest suffix that occurred
// before, where this suffix now ends at more places than the longer substrings of its state.
void SuffixAutomaton::extend(std::int32_t id) {
  const auto added = static_cast<std::int32_t>(states_.size());
  const std::int32_t length = states_[static_cast<std::size_t>(last_)].length + 1;
  states_.push_back({.length = length, .first_end = length});
  std::int32_t state = last_, edge = -1;
  last_ = added;
  for (; state >= 0 && (edge = find(state, id)) < 0; state = states_[static_cast<std::size_t>(state)].link)
    add_edge(state, id, added);
  std::int32_t link = 0;
  if (state >= 0) {
    link = edges_[static_cast<std::size_t>(edge)].target;
    const std::int32_t longer = states_[static_cast<std::size_t>(state)].length + 1;
    if (states_[static_cast<std::size_t>(link)].length != longer) {
      const std::int32_t whole = link;
      link = clone(whole, longer);
      for (; state >= 0; state = states_[static_cast<std::size_t>(state)].link) {
        edge = find(state, id);
        if (edge < 0 || edges_[static_cast<std::size_t>(edge)].target != whole) break;
        edges_[static_cast<std::size_t>(edge)].target = link;
      }
    }
  }
  states_[static_cast<std::size_t>(added)].link = link;
}

SuffixAutomaton::Match SuffixAutomaton::shortened(Match match, int longest) const {
  for (match.length = std::min(match.length, longest);;) {
    const std::int32_t link = states_[static_cast<std::size_t>(match.state)].link;
    if (link < 0 || match.length > states_[static_cast<std::size_t>(link)].length) return match;
    match.state = link;
  }
}

// Counts that each suffix of at most `tracked_` ids was followed by `id`, which has just been appended.
void SuffixAutomaton::count(std::int32_t id) {
  for (std::int32_t at = end_.state; at > 0; at = states_[static_cast<std::size_t>(at)].link) {
    State& state = states_[static_cast<std::size_t>(at)];
    ++state.followed;
    if (state.best >= 0 && edges_[static_cast<std::size_t>(state.best)].id == id) {
      ++state.best_count;
      continue;
    }
    const std::int32_t edge = find(at, id);
    const std::int32_t target = edges_[static_cast<std::size_t>(edge)].target;
    // The last of the occurrences of the target is that which ends here, which nothing follows yet.
    const std::int32_t occurrences = states_[static_cast<std::size_t>(target)].followed + 1;
    if (occurrences > state.best_count) {
      state.best = edge;
      state.best_count = occurrences;
    }
  }
}

void SuffixAutomaton::append(std::int32_t id) {
  extend(id);
  end_ = shortened(end_, tracked_);  // its state may have been split
  if (counts_) count(id);
  const std::int32_t target = edges_[static_cast<std::size_t>(find(end_.state, id))].target;
  end_ = shortened({target, end_.length + 1}, tracked_);
}

std::int32_t SuffixAutomaton::after_first_match(int shortest) const {
  const std::int32_t length = states_[static_cast<std::size_t>(last_)].length;
  Match match = end_;
  while (match.length >= shortest && states_[static_cast<std::size_t>(match.state)].first_end == length) {
    match.state = states_[static_cast<std::size_t>(match.state)].link;
    match.length = states_[static_cast<std::size_t>(match.state)].length;
  }
  return match.length >= shortest ? states_[static_cast<std::size_t>(match.state)].first_end : length;
}

SuffixAutomaton::Match SuffixAutomaton::match(std::span<const std::int32_t> context) const {
  Match found;
  for (const std::int32_t id : context.last(std::min(context.size(), static_cast<std::size_t>(longest_)))) {
    std::int32_t edge;
    while ((edge = find(found.state, id)) < 0 && found.state > 0) {
      found.state = states_[static_cast<std::size_t>(found.state)].link;
      found.length = states_[static_cast<std::size_t>(found.state)].length;
    }
    if (edge >= 0) found = shortened({edges_[static_cast<std::size_t>(edge)].target, found.length + 1}, tracked_);
  }
  return found;
}

SuffixAutomaton::Path SuffixAutomaton::follow(std::int32_t state, int limit, double least_probability) const {
  Path path{.state = state};
  double probability = 1.0;
  for (; path.length < limit; ++path.length) {
    const State& here = states_[static_cast<std::size_t>(state)];
    if (here.best < 0) break;
    const Edge& next = edges_[static_cast<std::size_t>(here.best)];
    probability *= static_cast<double>(here.best_count) / here.followed;
    if (next.id < 0 || probability < least_probability) break;
    path.score += probability;
    state = next.target;
  }
  return path;
}

Draft SuffixAutomaton::draft(Match at, const DraftLimits& limits) const {
  Path best;
  int followed = 0;  // how many ids were followed after a longer match of the same state
  for (; at.length > 0; --at.length) {
    while (at.length <= states_[static_cast<std::size_t>(states_[static_cast<std::size_t>(at.state)].link)].length) {
      at.state = states_[static_cast<std::size_t>(at.state)].link;
      followed = 0;
    }
    const int most = std::min(limits.count, static_cast<int>(std::min(limits.factor * at.length, 1e9)));
    if (best.score >= most) break;  // nor can a shorter match do better
    const int limit = std::min(most, longest_ + 1 - at.length);
    if (limit <= followed || best.score >= limit) continue;
    followed = limit;
    if (const Path path = follow(at.state, limit, limits.least_probability); path.score > best.score) best = path;
  }
  Draft draft{.ids = {}, .score = best.score};
  draft.ids.reserve(static_cast<std::size_t>(best.length));
  for (std::int32_t state = best.state; best.length > 0; --best.length) {
    const Edge& next = edges_[static_cast<std::size_t>(states_[static_cast<std::size_t>(state)].best)];
    draft.ids.push_back(next.id);
    state = next.target;
  }
  return draft;
}

Draft SuffixAutomaton::draft(const DraftLimits& limits) const { return draft(shortened(end_, longest_), limits); }

Draft SuffixAutomaton::draft(std::span<const std::int32_t> context, const DraftLimits& limits) const {
  return draft(match(context), limits);
}

}  // namespace vllmlite
