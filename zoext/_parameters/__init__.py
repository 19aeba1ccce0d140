"""Which tensors move, their keys, their shards, and how they are rounded."""
