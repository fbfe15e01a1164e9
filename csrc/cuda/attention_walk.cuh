// The keys and values that a warp of the decoding kernel reads, tile after tile, into stages in shared memory.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/cache.cuh"
#include "cuda/mma.cuh"

namespace vllmlite::cuda {

// Rows are padded by one access of 16 bytes, so that eight of them lie in different banks. The padding of bytes holds
// their head scale.
template <typename E, int kSize>
struct Stage {
  static constexpr int kKeys = kSize > 128 ? 16 : 2048 / kSize;
  static constexpr int kStride = kSize + kPack<E>;
  alignas(16) E keys[kKeys][kStride];
  E values[kKeys][kStride];

  static __device__ __forceinline__ float& scale(E (&row)[kStride]) { return *reinterpret_cast<float*>(&row[kSize]); }
};

// The first key of an item that its first query sees through a window.
__device__ __forceinline__ int first_key(const WorkItem& item, int window) {
  const int position = item.context - item.queries;
  return position + 1 - item.begin > window ? position + 1 - window : item.begin;
}

// The tiles of keys that a warp takes, in order: those of its block's work items, one after another. Items of so few
// queries that the block has no column of them are left out.
template <typename E, int kSize, int kWarps>
class Walk {
 public:
  static constexpr int kKeys = Stage<E, kSize>::kKeys, kStep = kWarps * kKeys, kParts = kKeys / 16;

  // Of items `first` up to `last`, for columns from `first_column` on.
  __device__ Walk(const Attention& given, int kv_head, int first_column, int first, int last, int warp)
      : given_(given), warp_(warp), first_column_(first_column), kv_head_(kv_head), item_(first), last_(last) {
    whole_ = given.block_size % 16 == 0;
    open();
  }

  // Whether the next tile's keys were all written by earlier steps.
  __device__ bool settled() const { return live_ && tile_ + kKeys <= settled_; }

  // Starts copying the next tile.
  __device__ void fetch(Stage<E, kSize>& stage, int lane) {
    constexpr int kWord = kPack<E>, kWords = kSize / kWord;  // elements in 16 bytes; of these in a key
    if (live_) {
      const E* cache = static_cast<const E*>(given_.kv);
      const int value_places = given_.kv_heads * given_.block_size;
      const std::int64_t values_at = static_cast<std::int64_t>(value_places) * given_.width;
      if (whole_ && given_.width == kSize && tile_ >= from_ && tile_ + kKeys <= end_) {
#pragma unroll
        for (int i = 0; i < kKeys * kWords / 32; ++i) {
          const int row = i * (32 / kWords) + lane / kWords, word = lane % kWords;
          const E* from = cache + static_cast<std::int64_t>(places_[i / (kWords / 2)]) * kSize + lane * kWord +
                          i % (kWords / 2) * 32 * kWord;
          copy_async(&stage.keys[row][word * kWord], from, true);
          copy_async(&stage.values[row][word * kWord], from + values_at, true);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kKeys * kWords / 32; ++i) {
          const int row = i * (32 / kWords) + lane / kWords, word = lane % kWords, key = tile_ + row;
          const bool there = key >= from_ && key < end_ && word * kWord < given_.width;
          const std::int64_t at = there ? static_cast<std::int64_t>(place_of(key)) * given_.width + word * kWord : 0;
          copy_async(&stage.keys[row][word * kWord], cache + at, there);
          copy_async(&stage.values[row][word * kWord], cache + (there ? at + values_at : 0), there);
        }
      }
      // Half of the lanes copy scales of keys, the others those of values.
      if constexpr (kQuantized<E>)
        if (given_.head_scales != nullptr)
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const int row = part * 16 + lane % 16, key = tile_ + row;
            const bool there = key >= from_ && key < end_;
            const int place = !there ? 0 : (whole_ ? places_[part] + lane % 16 : place_of(key));
            copy_async_word(&stage.scale(lane < 16 ? stage.keys[row] : stage.values[row]),
                            given_.head_scales + place + (lane < 16 || !there ? 0 : value_places), there);
          }
      tile_ += kStep;
      if (tile_ < end_)
        find();
      else
        open();
    }
    commit_copies();
  }

 private:
  // Which of the cache's heads of tokens a key is.
  __device__ int place_of(int key) const {
    return (table_[key / given_.block_size] * 2 * given_.kv_heads + kv_head_) * given_.block_size +
           key % given_.block_size;
  }

  // Looks up where the tile lies, one tile before that is needed.
  __device__ void find() {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      places_[part] = whole_ && tile_ + part * 16 < end_ ? place_of(tile_ + part * 16) : 0;
  }

  __device__ void open() {
    for (live_ = false; !live_ && item_ < last_; ++item_) {
      const WorkItem item = given_.batch.work_items[item_];
      if (item.queries * (given_.heads / given_.kv_heads) <= first_column_) continue;
      from_ = first_key(item, given_.window);
      end_ = item.end;
      settled_ = item.settled;
      tile_ = from_ / kStep * kStep + warp_ * kKeys;
      if (tile_ >= end_) continue;
      table_ = given_.batch.block_table + static_cast<std::int64_t>(item.slot) * given_.batch.max_blocks;
      live_ = true;
      find();
    }
  }

  const Attention& given_;
  const int warp_, first_column_, kv_head_;
  bool whole_, live_;  // 16 keys are in one block; there is a next tile
  int item_, last_, tile_, from_, end_, settled_;
  const std::int32_t* table_;
  int places_[kParts];
};

}  // namespace vllmlite::cuda
