"""The tensors that an optimizer moves, with their noise keys, shards and rounding."""
