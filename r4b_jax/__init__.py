"""r4b_jax: auto-thinking vision-language models (R-4B) in JAX: model, recipe, BPO, evaluation."""

__version__ = "0.1.0"
