// A connection between the ranks' shared memories of two hosts.
//
// Every host has shared memory for all ranks, of which some run there. A link copies what the ranks of its own host
// write (parts of exchanges, bytes for the next stage of a pipeline, signs of life) into the memory of the other host,
// where other ranks find it as if it had been written there. So collective operations are the same between processes
// and between hosts, and their sums have the same order. Node 0, the hub, has a link to each other node, and its memory
// passes on what two others tell each other.
//
// A frame is a head, a payload and a code over both:
//   bytes 0-3 size of the payload, 4-5 rank, 6 kind, 7 channel, 8-15 number of the frame, all little-endian;
//   payload; 16 bytes of HMAC-SHA-256.
// Each direction has a key of its own, and frames are numbered from 0: one that is made up, altered, repeated, left out
// or sent back ends the link.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "cpu/mac.hpp"
#include "cpu/ranks.hpp"

namespace vllmlite::cpu {

class Link {
 public:
  // The most bytes of a message.
  static constexpr std::size_t kMostMessage = std::size_t{64} << 20;

  // Takes over the connected socket `fd`. The ranks `first` up to `first + count` run on the node; `is_hub`: this is
  // the other end. Exchanges of channel 0 are among ranks of one group, whose size is `group`.
  // Throws std::runtime_error or std::invalid_argument.
  Link(std::shared_ptr<Ranks> ranks, int fd, std::string send_key, std::string receive_key, int first, int count,
       int group, bool is_hub);
  ~Link();
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  // Sends a message to the other end. False: the link has ended. Throws std::invalid_argument if it is too large.
  bool send(std::string_view message);
  // Waits for a message from the other end. Nothing: the link has ended.
  std::optional<std::string> receive();

  // Why the link has ended; empty: it has not.
  std::string end() const;
  // Waits until what the ranks of this side have written has been sent, for at most a second.
  void flush();
  // Ends the link; sends `goodbye` before, unless it is empty or cannot be sent at once, and lets it arrive.
  void close(std::string_view goodbye);

 private:
  enum class Kind : std::uint8_t { part, onward, taken, beat, message_piece, message };
  struct Head {
    std::uint32_t size;
    std::uint16_t rank;
    Kind kind;
    std::uint8_t channel;
    std::uint64_t number;
  };
  static constexpr std::size_t kHeadBytes = 16;

  bool is_there(int rank) const { return (rank >= first_ && rank < first_ + count_) == is_hub_; }
  // Whether a rank's parts are needed on the other side.
  bool passes_parts(int rank, int channel) const;
  // Whether the pipeline goes from `rank` to the other side: if `there`, from here to there, otherwise from there to
  // here.
  bool passes_onward(int rank, bool there) const;

  void send_changes();
  void send_parts(int rank, int channel);
  void send_onward(int rank);
  void receive_frames();
  bool take(const Head& head, const std::byte* payload);
  bool send_frame(Kind kind, int rank, int channel, const std::byte* data, std::size_t size);
  bool read(std::byte* data, std::size_t size);
  // Ends the link for the first reason that is given.
  void finish(const std::string& reason);

  std::shared_ptr<Ranks> ranks_;
  int fd_;
  Authenticator sign_, check_;
  int first_, count_, group_;
  bool is_hub_;

  // Of the sending thread: what the other side has been told.
  std::array<std::array<std::uint32_t, kChannels>, kMostRanks> parts_sent_{};
  std::array<std::size_t, kMostRanks> onward_sent_{}, taken_sent_{};
  std::array<std::uint32_t, kMostRanks> beats_sent_{};

  std::mutex sending_, sending_message_;
  std::vector<std::byte> outgoing_;
  std::uint64_t num_sent_ = 0, num_received_ = 0;

  mutable std::mutex state_;  // guards what follows
  std::condition_variable changed_;
  std::deque<std::string> messages_;
  std::string end_;
  std::string incomplete_;  // pieces of a message; the receiving thread's own

  std::atomic<bool> is_closing_{false};
  std::atomic<std::uint32_t> bell_done_{0};  // the bell's count when all was sent last

  std::jthread sender_, receiver_;
};

}  // namespace vllmlite::cpu
