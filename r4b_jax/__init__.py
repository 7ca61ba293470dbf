"""r4b_jax: auto-thinking vision-language models in JAX.

import r4b_jax
model = r4b_jax.load("path/to/checkpoint")
reply = model.chat("How many bars are below 40?", images=["chart.png"])
"""


def load(path, dtype: str | None = None):
    """A model one can talk to, from a Hugging Face folder, a converted checkpoint or a stage of a
    run: see `r4b_jax.decoding.chat.load`."""
    from r4b_jax.decoding.chat import load

    return load(path, dtype)
