"""Arrays alone: spectra, products, log scale, Krylov, LAPACK. No module here knows a step."""

from bptt_jax.linalg.eigensystem import Eigensystem, SingularVectors, eigensystem, singular_vectors
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.linalg.product_vectors import ProductSingularVectors, product_singular_vectors
from bptt_jax.linalg.products import jacobian_product, prefix_products, product_log_norms, suffix_products
from bptt_jax.linalg.spectra import condition_number, eigenvalues, singular_values, spectral_norm, spectral_radius

__all__ = [
    "Eigensystem",
    "LogScaled",
    "ProductSingularVectors",
    "SingularVectors",
    "condition_number",
    "eigensystem",
    "eigenvalues",
    "jacobian_product",
    "prefix_products",
    "product_log_norms",
    "product_singular_vectors",
    "singular_values",
    "singular_vectors",
    "spectral_norm",
    "spectral_radius",
    "suffix_products",
]
