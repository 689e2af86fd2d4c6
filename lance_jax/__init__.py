"""Fine-tuning with low-rank compressed activations: LANCE (arXiv 2509.21617) for JAX."""

from lance_jax import continual as continual
from lance_jax.blocks import blocks as blocks
from lance_jax.calibrate import calibrate as calibrate
from lance_jax.calibrate import last as last
from lance_jax.factors import Factors as Factors
from lance_jax.factors import LayerFactors as LayerFactors
from lance_jax.hosvd import subspace as subspace
from lance_jax.layers import Layer as Layer
from lance_jax.layers import layers as layers
from lance_jax.lowering import lower_for_cpu as lower_for_cpu
from lance_jax.memory import report as report
from lance_jax.step import value_and_grad as value_and_grad
from lance_jax.transform import compress as compress
