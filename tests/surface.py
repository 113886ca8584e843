"""What the package offers: every public name, once, as a user writes it after `bptt.`"""

import types
from typing import Any

import jax.numpy as jnp

import bptt_jax as bptt


def public() -> dict[str, Any]:
    """Of the names that stand in a namespace and above it, the shorter; no modules."""
    found: dict[str, Any] = {}

    def collect(prefix: str, module: types.ModuleType) -> None:
        members = {name: getattr(module, name) for name in module.__all__}
        inner = {name: member for name, member in members.items() if isinstance(member, types.ModuleType)}
        known = {id(member) for member in found.values()}
        found.update(
            (prefix + name, member)
            for name, member in members.items()
            if name not in inner and id(member) not in known
        )
        for name, member in inner.items():
            collect(f"{prefix}{name}.", member)

    collect("", bptt)
    return found


PUBLIC = public()


def takes_half(make: Any) -> bool:
    """Whether a cell can be made in half precision, which complex numbers do not have."""
    try:
        make(4, dtype=jnp.bfloat16)
    except TypeError:
        return False
    return True
