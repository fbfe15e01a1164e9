#include "cpu/mac.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace vllmlite::cpu {

namespace {

// Functions of libcrypto as its manual declares them; they are the same in versions 1.1 to 3.
struct Libcrypto {
  const void* (*sha256)();
  unsigned char* (*hmac)(const void* digest, const void* key, int key_size, const unsigned char* data, std::size_t size,
                         unsigned char* code, unsigned* code_size);
};

Libcrypto load_libcrypto() {
  for (const char* name : {"libcrypto.so.3", "libcrypto.so.1.1"}) {
    void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) continue;
    Libcrypto found{};
    found.sha256 = reinterpret_cast<decltype(found.sha256)>(dlsym(library, "EVP_sha256"));
    found.hmac = reinterpret_cast<decltype(found.hmac)>(dlsym(library, "HMAC"));
    if (found.sha256 != nullptr && found.hmac != nullptr) return found;
  }
  throw std::runtime_error("libcrypto.so.3 of OpenSSL, which connections between hosts need, is not installed");
}

const Libcrypto& libcrypto() {
  static const Libcrypto library = load_libcrypto();
  return library;
}

}  // namespace

Authenticator::Authenticator(std::string key) : key_(std::move(key)) { libcrypto(); }

Mac Authenticator::operator()(const std::byte* data, std::size_t size) const {
  std::array<unsigned char, 32> code{};
  unsigned code_size = 0;
  const auto* bytes = reinterpret_cast<const unsigned char*>(data);
  const Libcrypto& library = libcrypto();
  if (library.hmac(library.sha256(), key_.data(), static_cast<int>(key_.size()), bytes, size, code.data(),
                   &code_size) == nullptr)
    std::abort();  // out of memory: nothing may pass without a code
  Mac mac{};
  std::copy_n(code.begin(), mac.size(), mac.begin());
  return mac;
}

bool Authenticator::accepts(const std::byte* data, std::size_t size, const std::byte* mac) const {
  const Mac right = (*this)(data, size);
  unsigned differing = 0;
  for (std::size_t i = 0; i < right.size(); ++i) differing |= right[i] ^ static_cast<unsigned>(mac[i]);
  return differing == 0;
}

}  // namespace vllmlite::cpu
