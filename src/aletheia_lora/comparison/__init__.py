"""Selected layers against uniform LoRA and controls: same rows, same order, same steps, timed in turns."""

from .arms import Arm, CompareOptions
from .compare import compare

__all__ = ["Arm", "CompareOptions", "compare"]
