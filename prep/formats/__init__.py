"""Foreign file formats: optical flow and images."""

import os

StrPath = str | os.PathLike[str]
"""A path as Python's own functions accept it."""
