"""What to do about gradients that vanish or explode."""

from bptt_jax.remedies.clipping import (
    autoclip,
    clip_adjoints,
    clip_by_global_norm,
    clip_records,
    skip_records,
    skip_updates,
    with_clipping,
    zclip,
)
from bptt_jax.remedies.regularizers import flossing_penalty, omega_penalty, omega_terms

__all__ = [
    "autoclip",
    "clip_adjoints",
    "clip_by_global_norm",
    "clip_records",
    "flossing_penalty",
    "omega_penalty",
    "omega_terms",
    "skip_records",
    "skip_updates",
    "with_clipping",
    "zclip",
]
