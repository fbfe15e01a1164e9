// Shared memory of the processes ("ranks") of one host that compute a model together: messages, data of collective
// operations, and signs of life. One more process, the driver, sends steps to all ranks and gets the results.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>

namespace vllmlite::cpu {

inline constexpr int kMostRanks = 64;

// A rank takes part in this many groups at most, whose exchanges do not wait for each other.
inline constexpr int kChannels = 2;

// The most bytes that a rank contributes to one exchange; larger tensors take several.
inline constexpr std::size_t kExchangeBytes = std::size_t{512} << 10;

// A counter in shared memory. Whoever waits for it to change spins briefly, then sleeps.
struct alignas(64) Counter {
  std::atomic<std::uint32_t> value{0};
  std::atomic<std::uint32_t> sleepers{0};

  void advance();
};

// A stream of bytes from one process to `readers` others, each of which gets all of it.
struct Ring {
  static constexpr std::size_t kBytes = std::size_t{1} << 20;

  Counter written, consumed;
  alignas(64) std::atomic<std::size_t> end{0};
  struct alignas(64) Position {
    std::atomic<std::size_t> at{0};
  };
  std::array<Position, kMostRanks> readers{};
  alignas(64) std::array<std::byte, kBytes> bytes;
};

class Ranks {
 public:
  static constexpr int kDriver = -1;

  // Maps the memory behind descriptor `fd`, of which the first process to come sees zeros. `rank` may be kDriver. Of
  // the `world` ranks, `local` from `first` on run on this host and read the driver's messages (negative: all of them).
  // Throws std::runtime_error if it cannot be mapped.
  Ranks(int fd, int rank, int world, int first = 0, int local = -1);
  ~Ranks();
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  static std::size_t bytes(int world);

  int rank() const { return rank_; }
  int world() const { return world_; }

  // A message: from the driver to all ranks, or from the one rank that reports results to the driver. send waits while
  // there is no room; false: aborted. receive waits for at most `seconds` (negative: for ever) and returns nothing if
  // no message has come by then, if a signal has come, or if the ranks are aborted.
  bool send(std::string_view message);
  std::optional<std::string> receive(double seconds);

  // Bytes from this rank to the one that takes them over, in order. False: aborted.
  bool pass_on(const std::byte* data, std::size_t size);
  bool take_over(int from, std::byte* data, std::size_t size);

  // Makes every wait return at once, in all processes.
  void abort();
  bool aborted() const;

  // Starts a thread that shows every half second that this process runs, and ends the process at once when the other
  // end of the socket `watched` is closed (negative: there is none).
  void start_heartbeat(int watched);
  // Seconds since the last sign of life of each rank; negative: none yet.
  double silence(int rank) const;

  // The rank for which another one waits longer than a collective operation may take; -1: none.
  int late() const;
  // Seconds that a collective operation may take.
  void limit(double seconds) { limit_ = seconds; }

 private:
  friend class Exchange;
  friend class Link;

  struct Header {
    struct alignas(64) Rank {
      std::array<Counter, kChannels> arrived;
      std::array<std::array<std::atomic<std::uint32_t>, 2>, kChannels> sizes{};  // bytes of the last two parts
      std::atomic<std::uint32_t> seen_alive{0};                                  // in milliseconds, and odd
    };

    std::atomic<std::uint32_t> aborted{0};
    std::atomic<int> late{0};                 // the late rank + 1
    std::atomic<std::uint32_t> is_linked{0};  // there are links to other hosts, which wait for the bell
    Counter bell;                             // advances after every change that a link passes on
    std::array<Rank, kMostRanks> ranks{};
    Ring steps, results;
    std::array<Ring, kMostRanks> onward;  // of each rank to the one after it in the pipeline

    Rank& at(int rank) { return ranks[static_cast<std::size_t>(rank)]; }
    Ring& onward_from(int rank) { return onward[static_cast<std::size_t>(rank)]; }
    void ring_bell() {
      if (is_linked.load(std::memory_order_relaxed) != 0) bell.advance();
    }
  };

  // The time, for signs of life.
  static std::uint32_t milliseconds();
  // Waits until the bell's count is not `seen` any more, for at most `seconds`.
  void wait_for_bell(std::uint32_t seen, double seconds);

  template <typename Done>
  bool wait(Counter& counter, Done done, double seconds, bool interruptible);
  bool write(Ring& ring, int first, int last, const std::byte* data, std::size_t size);
  bool read(Ring& ring, int reader, std::byte* data, std::size_t size);
  std::byte* part(int channel, int rank, std::uint32_t exchange) const;

  int rank_, world_, first_, last_;
  double limit_ = 60;
  Header* header_ = nullptr;
  std::byte* parts_ = nullptr;
  std::jthread heart_;
};

// The exchanges of the ranks `first` up to `first + size`, which all of them make in the same order. In each, a rank
// writes its own part, arrives, and reads the parts of all.
class Exchange {
 public:
  Exchange(std::shared_ptr<Ranks> ranks, int first, int size, int channel);

  int rank() const { return ranks_->rank() - first_; }
  int size() const { return size_; }

  // The parts of the exchange that is being prepared (own) and of the one that all have arrived at.
  std::byte* own() const { return ranks_->part(channel_, ranks_->rank(), count_); }
  const std::byte* part(int rank) const { return ranks_->part(channel_, first_ + rank, count_ - 1); }

  // Publishes this rank's part, of `size` bytes, and waits for the others'. Returns early, with undefined contents, if
  // the ranks are aborted.
  void arrive(std::size_t size);

 private:
  std::shared_ptr<Ranks> ranks_;
  int first_, size_, channel_;
  std::uint32_t count_ = 0;
};

}  // namespace vllmlite::cpu
