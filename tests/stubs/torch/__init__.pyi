# PyTorch is optional: type checks do not depend on whether it is installed.
from typing import Any

def __getattr__(name: str) -> Any: ...
