// Message authentication codes: HMAC-SHA-256 (RFC 2104) by OpenSSL's libcrypto.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <utility>

namespace vllmlite::cpu {

// The first 16 bytes of an HMAC-SHA-256 are a code that cannot be guessed.
inline constexpr std::size_t kMacBytes = 16;
using Mac = std::array<unsigned char, kMacBytes>;

// Makes codes with one key. The library is loaded by the first of them, as most programs never need it.
class Authenticator {
 public:
  // Throws std::runtime_error if libcrypto is not installed.
  explicit Authenticator(std::string key);

  Mac operator()(const std::byte* data, std::size_t size) const;
  // Takes the same time for every wrong code.
  bool accepts(const std::byte* data, std::size_t size, const std::byte* mac) const;

 private:
  std::string key_;
};

}  // namespace vllmlite::cpu
