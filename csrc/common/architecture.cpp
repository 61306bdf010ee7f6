#include "common/architecture.h"

#include <algorithm>
#include <cmath>

#include "common/error.h"

namespace kvspn {

Architecture::Architecture(const kvspn_engine_params& p)
    : layers(p.layers),
      heads(p.heads),
      key_heads(p.key_heads ? p.key_heads : p.heads),
      rms_norm(p.rms_norm),
      norm_eps(p.norm_eps == 0 ? 1e-5f : p.norm_eps),
      gated(p.gated),
      rotary_base(p.rotary_base),
      cross(!p.no_cross),
      blocks(p.blocks),
      groups(p.groups),
      last_layer_only(p.last_layer_only),
      encoder_stride(std::max(p.encoder_stride, 1)) {
    require(layers >= 1, "layers must be at least 1, got ", layers);
    require(heads >= 1, "heads must be at least 1, got ", heads);
    require(key_heads >= 1 && heads % key_heads == 0, "key_heads must divide the ", heads, " heads, got ",
            key_heads);
    require(!cross || key_heads == heads, "key_heads must be 0 or ", heads, " with cross-attention, got ",
            key_heads);
    require(std::isfinite(norm_eps) && norm_eps > 0, "norm_eps must be a positive number, got ", p.norm_eps);
    require(std::isfinite(rotary_base) && (rotary_base == 0 || rotary_base > 1),
            "rotary_base must be 0 for none, or a number above 1, got ", rotary_base);
    require(blocks >= 0, "blocks must be at least 0, got ", blocks);
    require(p.encoder_stride >= 0, "encoder_stride must be at least 0, got ", p.encoder_stride);
    if (blocks) {
        require(groups >= 1 && layers % groups == 0 && blocks % groups == 0,
                "groups must divide the layers and the blocks, got ", groups);
    }
}

}  // namespace kvspn
