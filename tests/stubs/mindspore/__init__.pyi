# MindSpore's source has no annotations, and what type checkers infer from it is wrong (`construct` never returns).
from typing import Any

def __getattr__(name: str) -> Any: ...
