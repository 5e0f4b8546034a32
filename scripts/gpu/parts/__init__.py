"""The parts of the GPU check: each a module with `run(context, report)`."""

from typing import NamedTuple


class Part(NamedTuple):
    """Seconds after which a part is stopped."""

    limit_s: int
    quick_limit_s: int


# In the order in which they run: what is wrong is known before how fast it is.
PARTS = {
    "facts": Part(180, 75),
    "conformance": Part(900, 90),
    "sanitizer": Part(900, 100),
    "parity": Part(1200, 130),
    "invariance": Part(600, 90),
    "decode": Part(3600, 190),
    "prefill": Part(3600, 130),
    "kernels": Part(1800, 60),
}
