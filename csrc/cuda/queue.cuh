// The queue through which keys and values come in.
#pragma once

#include <type_traits>

#include "cuda/copy_queue.cuh"
#include "cuda/pair_queue.cuh"
#include "cuda/tile_queue.cuh"

namespace foldkv::cuda {

template <class S, class K, class V>
using TilesQueue =
    std::conditional_t<S::kStageTokens == kNarrowBlock && S::kStages % 2 == 0, PairQueue<S, K, V>, TileQueue<S, K, V>>;
template <class S, class K, class V>
using Queue = std::conditional_t<S::kTiles, TilesQueue<S, K, V>, CopyQueue<S, K, V>>;

}  // namespace foldkv::cuda
