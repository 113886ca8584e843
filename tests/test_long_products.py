"""Products of 100,000 Jacobians in float32, against closed forms and float64 with the scale apart."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt

T = 100_000
MARKS = (0, 1, 777, T // 2, T - 1)


def by_hand(factors: np.ndarray) -> tuple[dict[int, float], dict[int, float]]:
    """log ||J_{T-1} ... J_t|| and log ||J_t ... J_0|| at the marks."""

    def run(order: range, *, forwards: bool) -> dict[int, float]:
        product, log_scale, found = np.eye(factors.shape[1]), 0.0, {}
        for t in order:
            product = factors[t] @ product if forwards else product @ factors[t]
            if t in MARKS or t % 100 == 0:
                size = np.max(np.abs(product))
                product, log_scale = product / size, log_scale + math.log(size)
            if t in MARKS:
                found[t] = log_scale + math.log(np.linalg.norm(product, 2))
        return found

    return run(range(T - 1, -1, -1), forwards=False), run(range(T), forwards=True)


def repeated(*matrices: np.ndarray) -> np.ndarray:
    return np.resize(np.stack(matrices).astype(np.float32), (T, 2, 2))


@pytest.mark.parametrize(
    "factors",
    [
        repeated(0.9 * np.eye(2)),
        repeated(1.1 * np.array([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]])),
        repeated(2 * np.eye(2), 0.5 * np.eye(2), np.eye(2)),
        np.random.default_rng(0).standard_normal((T, 2, 2)).astype(np.float32),
    ],
    ids=["contracting", "expanding and turning", "by turns", "gaussian"],
)
def test_log_norms(factors: np.ndarray) -> None:
    suffix, prefix = by_hand(factors.astype(np.float64))

    def close(got: float, expected: float) -> None:
        assert float(got) == pytest.approx(expected, rel=1e-4, abs=2e-3)

    def norm(product: bptt.linalg.LogScaled, t: int) -> float:
        return float(product.log_scale[t]) + math.log(np.linalg.norm(np.asarray(product.mantissa[t]), 2))

    jacobians = jnp.asarray(factors)
    log_norms = np.asarray(bptt.product_log_norms(jacobians))
    suffixes, prefixes = bptt.linalg.suffix_products(jacobians), bptt.linalg.prefix_products(jacobians)
    for t in MARKS:
        close(log_norms[t], suffix[t])
        close(norm(suffixes, t), suffix[t])
        close(norm(prefixes, t), prefix[t])
    whole = bptt.jacobian_product(jacobians)
    close(float(whole.log_scale) + math.log(np.linalg.norm(np.asarray(whole.mantissa), 2)), suffix[0])
