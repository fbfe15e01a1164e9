// A suffix automaton of a growing sequence of ids: finds the earlier occurrences of the sequence's end, and their most
// frequent continuation.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace vllmlite {

// Drafts, and the expected number of right ones, if the text continues with the same frequencies as before.
struct Draft {
  std::vector<std::int32_t> ids;
  double score = 0.0;
};

// Limits of drafts that are predicted from counts of earlier continuations.
struct DraftLimits {
  int count;                 // most drafts
  double factor;             // drafts per id of the matched context
  double least_probability;  // of the whole draft up to an id
};

// The smallest automaton that accepts every substring. A state stands for the substrings that end at the same places;
// they are the suffixes, down to some length, of its longest one. Appending an id takes amortised constant time, plus,
// if counts are kept, a step for each state among the suffixes of at most `longest` ids. An id takes about 120 bytes.
class SuffixAutomaton {
 public:
  // `longest` is the length up to which the end of the sequence is matched. Counts are needed by draft() alone.
  SuffixAutomaton(int longest, bool counts);

  void append(std::int32_t id);

  // The place after the first occurrence of the longest suffix of the sequence, of `shortest` to `longest` ids, that
  // occurred before; the length of the sequence if there is none.
  std::int32_t after_first_match(int shortest) const;

  // Predicts the ids after `context`. For each m up to `longest`, its last m ids are looked up; from there, the most
  // frequent next id is appended repeatedly, at most min(count, factor * m, longest + 1 - m) times (among equally
  // frequent ids, the one that had this frequency first), while the joint probability is high enough. Returns the draft
  // with the highest score; among equal scores, that of the longest match. Negative ids are never drafted.
  Draft draft(std::span<const std::int32_t> context, const DraftLimits& limits) const;
  // The same for the sequence itself.
  Draft draft(const DraftLimits& limits) const;

 private:
  struct State {
    std::int32_t length = 0;     // of the longest substring
    std::int32_t link = -1;      // state of the longest suffix that ends at more places
    std::int32_t first_end = 0;  // end of the first occurrence
    std::int32_t edges = -1;     // first of its list of edges
    std::int32_t num_edges = 0;  // if above `kListed`, they are also in the hash table
    std::int32_t followed = 0;   // occurrences that are followed by an id, of substrings of at most `tracked_` ids
    std::int32_t best = -1;      // edge of the id that followed most often
    std::int32_t best_count = 0;
  };
  struct Edge {
    std::int32_t source, id, target, next;
  };
  // A suffix of the sequence or of a context.
  struct Match {
    std::int32_t state = 0;
    std::int32_t length = 0;
  };

  // What most often followed a state, again and again.
  struct Path {
    std::int32_t state = 0;
    int length = 0;
    double score = 0.0;  // expected number of its ids that are right
  };

  static constexpr std::int32_t kListed = 4;

  std::int32_t find(std::int32_t state, std::int32_t id) const;  // index of the edge, or -1
  std::size_t bucket(std::int32_t state, std::int32_t id) const;
  void add_edge(std::int32_t state, std::int32_t id, std::int32_t target);
  void hash(std::int32_t edge);    // adds an edge to the hash table
  void place(std::int32_t entry);  // in a free bucket
  std::int32_t clone(std::int32_t state, std::int32_t length);
  void extend(std::int32_t id);
  void count(std::int32_t id);
  Match shortened(Match match, int longest) const;
  Match match(std::span<const std::int32_t> context) const;
  Path follow(std::int32_t state, int limit, double least_probability) const;
  Draft draft(Match at, const DraftLimits& limits) const;

  int longest_;
  int tracked_;  // length of end_; with counts one more, to count the occurrences of a longest suffix and an id after
                 // it
  bool counts_;
  std::vector<State> states_;
  std::vector<Edge> edges_;
  std::vector<std::int32_t> table_;  // hash table of the edges of states that have many: index + 1, or 0
  std::size_t num_hashed_ = 0;
  std::int32_t last_ = 0;  // state of the whole sequence
  Match end_;              // its longest suffix of at most `tracked_` ids
};

}  // namespace vllmlite
