#include "cpu/link.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace vllmlite::cpu {

namespace {

constexpr std::size_t kMostPayload = kExchangeBytes;
constexpr double kBeatSeconds = 0.25;  // between two looks at the ranks' signs of life
constexpr auto kClosing = std::chrono::milliseconds(500);
constexpr int kFlushMilliseconds = 1000;
constexpr int kSendMicroseconds = 200'000;  // after which a blocked sender looks whether the link is being closed

template <typename T>
void put(std::byte* to, T value) {
  for (std::size_t i = 0; i < sizeof(T); ++i)
    to[i] = static_cast<std::byte>(static_cast<std::uint64_t>(value) >> (8 * i) & 0xff);
}

template <typename T>
T get(const std::byte* from) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i) value |= static_cast<std::uint64_t>(from[i]) << (8 * i);
  return static_cast<T>(value);
}

}  // namespace

Link::Link(std::shared_ptr<Ranks> ranks, int fd, std::string send_key, std::string receive_key, int first, int count,
           int group, bool is_hub)
    : ranks_(std::move(ranks)),
      fd_(fd),
      sign_(std::move(send_key)),
      check_(std::move(receive_key)),
      first_(first),
      count_(count),
      group_(group),
      is_hub_(is_hub) {
  if (first < 0 || count < 1 || first + count > ranks_->world() || group < 1 || ranks_->world() % group != 0)
    throw std::invalid_argument("a link to ranks that are not there");
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  timeval patience{};
  patience.tv_usec = kSendMicroseconds;
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
  ranks_->header_->is_linked.store(1);
  receiver_ = std::jthread([this] { receive_frames(); });
  sender_ = std::jthread([this] { send_changes(); });
}

Link::~Link() {
  close({});
  sender_.join();
  receiver_.join();
  ::close(fd_);
}

bool Link::passes_parts(int rank, int channel) const {
  const int begin = channel == 0 ? rank / group_ * group_ : 0;
  const int end = channel == 0 ? begin + group_ : ranks_->world();
  for (int other = begin; other < end; ++other)
    if (is_there(other) != is_there(rank)) return true;
  return false;
}

bool Link::passes_onward(int rank, bool there) const {
  return rank + group_ < ranks_->world() && is_there(rank) != there && is_there(rank + group_) == there;
}

void Link::send_changes() {
  Ranks::Header& header = *ranks_->header_;
  while (!ranks_->aborted() && end().empty()) {
    const std::uint32_t seen = header.bell.value.load();
    for (int rank = 0; rank < ranks_->world(); ++rank) {
      const auto index = static_cast<std::size_t>(rank);
      Ring& ring = header.onward_from(rank);
      if (is_there(rank)) {
        const std::size_t taken = ring.readers[0].at.load();
        if (passes_onward(rank, false) && taken != taken_sent_[index]) {
          std::byte position[sizeof(std::uint64_t)];
          put(position, static_cast<std::uint64_t>(taken));
          send_frame(Kind::taken, rank, 0, position, sizeof position);
          taken_sent_[index] = taken;
        }
        continue;
      }
      for (int channel = 0; channel < kChannels; ++channel)
        if (passes_parts(rank, channel)) send_parts(rank, channel);
      if (passes_onward(rank, true)) send_onward(rank);
      const std::uint32_t beat = header.at(rank).seen_alive.load();
      if (beat != beats_sent_[index]) send_frame(Kind::beat, rank, 0, nullptr, 0);
      beats_sent_[index] = beat;
    }
    bell_done_.store(seen);
    ranks_->wait_for_bell(seen, kBeatSeconds);
  }
}

// A rank is at most two exchanges ahead of what has been sent: before its third, the other side must have answered the
// first. So both parts are intact.
void Link::send_parts(int rank, int channel) {
  const auto at = static_cast<std::size_t>(channel);
  Ranks::Header::Rank& from = ranks_->header_->at(rank);
  std::uint32_t& sent = parts_sent_[static_cast<std::size_t>(rank)][at];
  for (; sent != from.arrived[at].value.load() && !ranks_->aborted(); ++sent)
    if (!send_frame(Kind::part, rank, channel, ranks_->part(channel, rank, sent),
                    std::min<std::size_t>(from.sizes[at][sent % 2].load(), kExchangeBytes)))
      return;
}

// Bytes stay in this side's ring until the other side has taken them out of its own, so that there is room for them.
void Link::send_onward(int rank) {
  Ring& ring = ranks_->header_->onward_from(rank);
  std::size_t& sent = onward_sent_[static_cast<std::size_t>(rank)];
  while (sent != ring.end.load()) {
    const std::size_t place = sent % Ring::kBytes;
    const std::size_t size = std::min({ring.end.load() - sent, Ring::kBytes - place, kMostPayload});
    if (!send_frame(Kind::onward, rank, 0, ring.bytes.data() + place, size)) return;
    sent += size;
  }
}

bool Link::send_frame(Kind kind, int rank, int channel, const std::byte* data, std::size_t size) {
  const std::scoped_lock lock(sending_);
  outgoing_.resize(kHeadBytes + size + kMacBytes);
  std::byte* frame = outgoing_.data();
  put(frame, static_cast<std::uint32_t>(size));
  put(frame + 4, static_cast<std::uint16_t>(rank));
  put(frame + 6, static_cast<std::uint8_t>(kind));
  put(frame + 7, static_cast<std::uint8_t>(channel));
  put(frame + 8, num_sent_++);
  if (size > 0) std::memcpy(frame + kHeadBytes, data, size);
  const Mac mac = sign_(frame, kHeadBytes + size);
  std::memcpy(frame + kHeadBytes + size, mac.data(), mac.size());
  for (std::size_t at = 0; at < outgoing_.size();) {
    const ssize_t written = ::send(fd_, frame + at, outgoing_.size() - at, MSG_NOSIGNAL);
    if (written >= 0) {
      at += static_cast<std::size_t>(written);
    } else if (errno != EINTR && (errno != EAGAIN || is_closing_)) {
      return false;  // the receiving thread says how the connection has ended, once it has read what was sent before
    }
  }
  return true;
}

bool Link::send(std::string_view message) {
  if (message.size() > kMostMessage)
    throw std::invalid_argument("a message of " + std::to_string(message.size()) + " bytes is too large");
  const std::scoped_lock lock(sending_message_);
  while (true) {
    const std::size_t size = std::min(message.size(), kMostPayload);
    const Kind kind = size < message.size() ? Kind::message_piece : Kind::message;
    if (!end().empty() || !send_frame(kind, 0, 0, reinterpret_cast<const std::byte*>(message.data()), size))
      return false;
    message.remove_prefix(size);
    if (kind == Kind::message) return true;
  }
}

std::optional<std::string> Link::receive() {
  std::unique_lock lock(state_);
  changed_.wait(lock, [this] { return !messages_.empty() || !end_.empty(); });
  if (messages_.empty()) return std::nullopt;
  std::string message = std::move(messages_.front());
  messages_.pop_front();
  return message;
}

bool Link::read(std::byte* data, std::size_t size) {
  while (size > 0) {
    const ssize_t count = recv(fd_, data, size, 0);
    if (count > 0) {
      data += count;
      size -= static_cast<std::size_t>(count);
    } else if (count == 0) {
      finish("has closed its connection");
      return false;
    } else if (errno != EINTR) {
      finish(std::string("has lost its connection: ") + strerror(errno));
      return false;
    }
  }
  return true;
}

void Link::receive_frames() {
  std::vector<std::byte> frame(kHeadBytes + kMostPayload + kMacBytes);
  const std::byte* at = frame.data();
  std::string wrong;
  while (wrong.empty() && read(frame.data(), kHeadBytes)) {
    const Head head{get<std::uint32_t>(at), get<std::uint16_t>(at + 4), static_cast<Kind>(get<std::uint8_t>(at + 6)),
                    get<std::uint8_t>(at + 7), get<std::uint64_t>(at + 8)};
    if (head.size > kMostPayload) {
      wrong = "has sent a frame of " + std::to_string(head.size) + " bytes, which is too large";
    } else if (!read(frame.data() + kHeadBytes, head.size + kMacBytes)) {
      return;
    } else if (!check_.accepts(at, kHeadBytes + head.size, at + kHeadBytes + head.size)) {
      wrong = "has sent a frame that is not authentic";
    } else if (head.number != num_received_++) {
      wrong = "has sent frame " + std::to_string(head.number) + " out of order";
    } else if (!take(head, at + kHeadBytes)) {
      wrong = "has sent a frame that makes no sense";
    }
  }
  if (wrong.empty()) return;
  finish(wrong);
  shutdown(fd_, SHUT_RDWR);
}

// Copies what a frame carries, which a rank of the other side has written, to this side's memory. Returns false if the
// frame is not valid.
bool Link::take(const Head& head, const std::byte* payload) {
  Ranks::Header& header = *ranks_->header_;
  const int rank = head.rank;
  if (head.kind == Kind::message || head.kind == Kind::message_piece) {
    if (incomplete_.size() + head.size > kMostMessage) return false;
    incomplete_.append(reinterpret_cast<const char*>(payload), head.size);
    if (head.kind == Kind::message_piece) return true;
    const std::scoped_lock lock(state_);
    messages_.push_back(std::exchange(incomplete_, {}));
    changed_.notify_all();
    return true;
  }
  if (rank >= ranks_->world()) return false;
  if (head.kind == Kind::taken) {
    Ring& ring = header.onward_from(rank);
    if (!passes_onward(rank, true) || head.size != sizeof(std::uint64_t)) return false;
    const auto position = static_cast<std::size_t>(get<std::uint64_t>(payload));
    const std::size_t before = ring.readers[0].at.load(), end = ring.end.load();
    if (position - before > end - before) return false;
    ring.readers[0].at.store(position);
    ring.consumed.advance();
    header.ring_bell();
    return true;
  }
  if (!is_there(rank)) return false;
  if (head.kind == Kind::beat) {
    header.at(rank).seen_alive.store(Ranks::milliseconds() | 1);
    header.ring_bell();
    return true;
  }
  if (head.kind == Kind::part) {
    const auto channel = static_cast<std::size_t>(head.channel);
    if (channel >= kChannels || !passes_parts(rank, head.channel)) return false;
    Counter& arrived = header.at(rank).arrived[channel];
    const std::uint32_t exchange = arrived.value.load();
    std::memcpy(ranks_->part(head.channel, rank, exchange), payload, head.size);
    header.at(rank).sizes[channel][exchange % 2].store(head.size);
    arrived.advance();
    header.ring_bell();
    return true;
  }
  if (head.kind != Kind::onward || !passes_onward(rank, false)) return false;
  Ring& ring = header.onward_from(rank);
  const std::size_t end = ring.end.load(), place = end % Ring::kBytes;
  const std::size_t before_wrap = std::min<std::size_t>(head.size, Ring::kBytes - place);
  if (end + head.size - ring.readers[0].at.load() > Ring::kBytes) return false;
  std::memcpy(ring.bytes.data() + place, payload, before_wrap);
  std::memcpy(ring.bytes.data(), payload + before_wrap, head.size - before_wrap);
  ring.end.store(end + head.size);
  ring.written.advance();
  header.ring_bell();
  return true;
}

std::string Link::end() const {
  const std::scoped_lock lock(state_);
  return end_;
}

void Link::finish(const std::string& reason) {
  const std::scoped_lock lock(state_);
  if (end_.empty()) end_ = reason;
  changed_.notify_all();
}

void Link::flush() {
  for (int waited = 0; waited < kFlushMilliseconds && end().empty(); ++waited) {
    if (bell_done_.load() == ranks_->header_->bell.value.load()) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void Link::close(std::string_view goodbye) {
  is_closing_ = true;
  if (!goodbye.empty()) send(goodbye);
  shutdown(fd_, SHUT_WR);
  {
    std::unique_lock lock(state_);
    changed_.wait_for(lock, kClosing, [this] { return !end_.empty(); });
    if (end_.empty()) end_ = "has been closed";
  }
  shutdown(fd_, SHUT_RDWR);
  ranks_->header_->bell.advance();
  changed_.notify_all();
}

}  // namespace vllmlite::cpu
