#include "cpu/ranks.hpp"

#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "cpu/pause.hpp"

namespace vllmlite::cpu {

namespace {

constexpr std::int64_t kSpinNanoseconds = 50'000;
constexpr int kSpinsBetweenLooks = 32;  // pauses between two looks at the clock
constexpr int kBeatMilliseconds = 500;

std::int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

#if defined(__linux__)
long futex(std::atomic<std::uint32_t>& word, int operation, std::uint32_t value, const timespec* time) {
  static_assert(sizeof word == sizeof(std::uint32_t));
#if defined(SYS_futex_time64) && __SIZEOF_LONG__ == 4
  constexpr long kFutex = SYS_futex_time64;
#else
  constexpr long kFutex = SYS_futex;
#endif
  return syscall(kFutex, &word, operation, value, time, nullptr, 0);
}

// Sleeps while `word` has `value`, for at most so long (negative: for ever). Returns false if a signal came.
bool sleep_while(std::atomic<std::uint32_t>& word, std::uint32_t value, std::int64_t nanoseconds) {
  timespec time{};
  time.tv_sec = static_cast<decltype(time.tv_sec)>(nanoseconds / 1'000'000'000);
  time.tv_nsec = static_cast<decltype(time.tv_nsec)>(nanoseconds % 1'000'000'000);
  return futex(word, FUTEX_WAIT, value, nanoseconds < 0 ? nullptr : &time) == 0 || errno != EINTR;
}

void wake_all(std::atomic<std::uint32_t>& word) { futex(word, FUTEX_WAKE, kMostRanks, nullptr); }
#else
bool sleep_while(std::atomic<std::uint32_t>&, std::uint32_t, std::int64_t) { return usleep(1000) == 0; }

void wake_all(std::atomic<std::uint32_t>&) {}
#endif

bool reached(const std::atomic<std::uint32_t>& counter, std::uint32_t value) {
  return static_cast<std::int32_t>(counter.load(std::memory_order_acquire) - value) >= 0;
}

}  // namespace

void Counter::advance() {
  value.fetch_add(1);
  if (sleepers.load() != 0) wake_all(value);
}

std::uint32_t Ranks::milliseconds() { return static_cast<std::uint32_t>(now() / 1'000'000); }

std::size_t Ranks::bytes(int world) {
  return sizeof(Header) + static_cast<std::size_t>(kChannels * world) * 2 * kExchangeBytes;
}

Ranks::Ranks(int fd, int rank, int world, int first, int local)
    : rank_(rank), world_(world), first_(first), last_(local < 0 ? world : first + local) {
  static_assert(std::atomic<std::size_t>::is_always_lock_free && std::atomic<std::uint32_t>::is_always_lock_free);
  if (world < 1 || world > kMostRanks)
    throw std::runtime_error("there are 1 to " + std::to_string(kMostRanks) + " ranks");
  if (rank < kDriver || rank >= world) throw std::runtime_error("there is no rank " + std::to_string(rank));
  if (first < 0 || last_ <= first || last_ > world) throw std::runtime_error("there are no such local ranks");
  void* memory = mmap(nullptr, bytes(world), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) throw std::runtime_error(std::string("shared memory of the ranks: ") + strerror(errno));
  header_ = static_cast<Header*>(memory);  // zeros are a valid header: all of it is atomics and bytes
  parts_ = static_cast<std::byte*>(memory) + sizeof(Header);
}

Ranks::~Ranks() {
  heart_ = {};
  munmap(header_, bytes(world_));
}

std::byte* Ranks::part(int channel, int rank, std::uint32_t exchange) const {
  return parts_ + (static_cast<std::size_t>(channel * world_ + rank) * 2 + exchange % 2) * kExchangeBytes;
}

// Waits until `done`. False if it is not within `seconds` (negative: for ever), if the ranks are aborted, or, if the
// wait is interruptible, when a signal comes.
template <typename Done>
bool Ranks::wait(Counter& counter, Done done, double seconds, bool interruptible) {
  const std::int64_t begin = now();
  const std::int64_t spin_until = rank_ == kDriver ? begin : begin + kSpinNanoseconds;
  for (int spins = 0; !done(); ++spins) {
    pause();
    if (spins % kSpinsBetweenLooks == 0 && now() >= spin_until) break;
  }
  if (done()) return true;
  const std::int64_t until = begin + static_cast<std::int64_t>(seconds * 1e9);
  bool is_done = false;
  counter.sleepers.fetch_add(1);
  while (true) {
    const std::uint32_t value = counter.value.load();
    is_done = done();
    const std::int64_t left = seconds < 0 ? -1 : std::max(until - now(), std::int64_t{0});
    if (is_done || aborted() || left == 0) break;
    if (!sleep_while(counter.value, value, left) && interruptible) break;
  }
  counter.sleepers.fetch_sub(1);
  return is_done;
}

void Ranks::wait_for_bell(std::uint32_t seen, double seconds) {
  Counter& bell = header_->bell;
  wait(bell, [&] { return bell.value.load() != seen; }, seconds, false);
}

// Writes to the ring that ranks `first` up to `last` read.
bool Ranks::write(Ring& ring, int first, int last, const std::byte* data, std::size_t size) {
  std::size_t end = ring.end.load(std::memory_order_relaxed);
  while (size > 0) {
    std::size_t room = 0;
    const auto has_room = [&] {
      room = Ring::kBytes;
      for (int reader = first; reader < last; ++reader) {
        const auto& position = ring.readers[static_cast<std::size_t>(reader)].at;
        room = std::min(room, Ring::kBytes - (end - position.load(std::memory_order_acquire)));
      }
      return room > 0;
    };
    if (!wait(ring.consumed, has_room, -1, false)) return false;
    const std::size_t at = end % Ring::kBytes;
    const std::size_t count = std::min({size, room, Ring::kBytes - at});
    std::memcpy(ring.bytes.data() + at, data, count);
    end += count;
    data += count;
    size -= count;
    ring.end.store(end, std::memory_order_release);
    ring.written.advance();
    header_->ring_bell();
  }
  return true;
}

bool Ranks::read(Ring& ring, int reader, std::byte* data, std::size_t size) {
  std::atomic<std::size_t>& position = ring.readers[static_cast<std::size_t>(reader)].at;
  std::size_t at = position.load(std::memory_order_relaxed);
  while (size > 0) {
    std::size_t end = at;
    const auto has_more = [&] { return (end = ring.end.load(std::memory_order_acquire)) != at; };
    if (!wait(ring.written, has_more, -1, false)) return false;
    const std::size_t place = at % Ring::kBytes;
    const std::size_t count = std::min({size, end - at, Ring::kBytes - place});
    std::memcpy(data, ring.bytes.data() + place, count);
    at += count;
    data += count;
    size -= count;
    position.store(at, std::memory_order_release);
    ring.consumed.advance();
    header_->ring_bell();
  }
  return true;
}

bool Ranks::send(std::string_view message) {
  Ring& ring = rank_ == kDriver ? header_->steps : header_->results;
  const int first = rank_ == kDriver ? first_ : 0, last = rank_ == kDriver ? last_ : 1;
  const std::uint64_t size = message.size();
  std::byte length[sizeof size];
  std::memcpy(length, &size, sizeof size);
  return write(ring, first, last, length, sizeof length) &&
         write(ring, first, last, reinterpret_cast<const std::byte*>(message.data()), message.size());
}

std::optional<std::string> Ranks::receive(double seconds) {
  Ring& ring = rank_ == kDriver ? header_->results : header_->steps;
  const int reader = rank_ == kDriver ? 0 : rank_;
  const std::atomic<std::size_t>& position = ring.readers[static_cast<std::size_t>(reader)].at;
  const auto has_come = [&] { return ring.end.load(std::memory_order_acquire) != position.load(); };
  if (!wait(ring.written, has_come, seconds, true)) return std::nullopt;
  std::uint64_t size = 0;
  std::byte length[sizeof size];
  if (!read(ring, reader, length, sizeof length)) return std::nullopt;
  std::memcpy(&size, length, sizeof size);
  std::string message(size, '\0');
  if (!read(ring, reader, reinterpret_cast<std::byte*>(message.data()), message.size())) return std::nullopt;
  return message;
}

bool Ranks::pass_on(const std::byte* data, std::size_t size) {
  return write(header_->onward_from(rank_), 0, 1, data, size);
}

bool Ranks::take_over(int from, std::byte* data, std::size_t size) {
  return read(header_->onward_from(from), 0, data, size);
}

void Ranks::abort() {
  header_->aborted.store(1);
  for (int rank = 0; rank < world_; ++rank) {
    for (Counter& arrived : header_->at(rank).arrived) arrived.advance();
    Ring& ring = header_->onward_from(rank);
    ring.written.advance();
    ring.consumed.advance();
  }
  for (Ring* ring : {&header_->steps, &header_->results}) {
    ring->written.advance();
    ring->consumed.advance();
  }
  header_->bell.advance();
}

bool Ranks::aborted() const { return header_->aborted.load() != 0; }

void Ranks::start_heartbeat(int watched) {
  std::atomic<std::uint32_t>& seen_alive = header_->at(rank_).seen_alive;
  seen_alive.store(milliseconds() | 1);
  heart_ = std::jthread([watched, &seen_alive](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      seen_alive.store(milliseconds() | 1);
      pollfd descriptor{watched, 0, 0};  // reports only that the other end is closed
      if (poll(&descriptor, 1, kBeatMilliseconds) > 0) _exit(1);
    }
  });
}

double Ranks::silence(int rank) const {
  const std::uint32_t last = header_->at(rank).seen_alive.load();
  const auto elapsed = static_cast<std::int32_t>(milliseconds() - last);
  return last == 0 ? -1 : std::max(elapsed, 0) * 1e-3;
}

int Ranks::late() const { return header_->late.load() - 1; }

Exchange::Exchange(std::shared_ptr<Ranks> ranks, int first, int size, int channel)
    : ranks_(std::move(ranks)), first_(first), size_(size), channel_(channel) {
  if (first < 0 || size < 1 || rank() < 0 || rank() >= size || first + size > ranks_->world() || channel < 0 ||
      channel >= kChannels)
    throw std::invalid_argument("this rank takes no part in the exchange");
}

void Exchange::arrive(std::size_t size) {
  const auto channel = static_cast<std::size_t>(channel_);
  ranks_->header_->at(ranks_->rank()).sizes[channel][count_ % 2].store(static_cast<std::uint32_t>(size));
  ++count_;
  const auto of = [this, channel](int rank) -> Counter& { return ranks_->header_->at(first_ + rank).arrived[channel]; };
  of(rank()).advance();
  ranks_->header_->ring_bell();
  for (int rank = 0; rank < size_; ++rank) {
    Counter& counter = of(rank);
    const auto has_arrived = [&] { return reached(counter.value, count_); };
    if (ranks_->wait(counter, has_arrived, ranks_->limit_, false) || ranks_->aborted()) continue;
    int none = 0;
    ranks_->header_->late.compare_exchange_strong(none, first_ + rank + 1);
    ranks_->wait(counter, has_arrived, -1, false);  // whoever watches `late` ends all ranks
  }
}

}  // namespace vllmlite::cpu
