"""Paths that several folders of this project share. Imports only Python's standard library."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
"""This checkout."""
OPERATORS = "share/pwcnet-mindspore"
"""Folder of an environment where launch/bundle.sh puts CUDA operators, and model/native/build.py looks for them."""
