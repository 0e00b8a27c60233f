"""Foreign file formats: optical flow, images and NumPy arrays."""

import os

StrPath = str | os.PathLike[str]
"""A path as Python's own functions accept it."""

# Deflate compresses at most 1,032 bytes into one, so a file that claims more is damaged: allocate nothing for it.
MAX_EXPANSION = 1100

# The largest image or flow: compressed to a quarter, its pair fits in a page of a shard (prep/shards.py). A few
# kilobytes of deflate can claim far more.
MAX_PIXELS = 1 << 26
