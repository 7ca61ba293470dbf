"""The tokenizer, the parameters and the jitted functions that several test files use."""

import dataclasses
import functools
import os
import pathlib
import runpy

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where libtpu is installed, jax looks for a TPU

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODEL

from r4b_jax import config as c
from r4b_jax.data.tokenizer import Tokenizer, train_tokenizer
from r4b_jax.data.worlds import corpus
from r4b_jax.models import r4b
from r4b_jax.models.vocabulary import ban
from r4b_jax.training.losses import token_logps

jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the suite's time


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Compile an equal program once, though each run of a loop makes its own jitted functions."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Let go of a file's programs: a process may map only so many, and then XLA aborts."""
    yield
    jax.clear_caches()


ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A tokenizer of the world's language from a few of its texts."""
    return train_tokenizer(corpus(c.WorldConfig(), 300), 300)


@pytest.fixture(scope="session")
def params() -> dict:
    """Parameters of MODEL with no zero biases, no unit scales, and logits that differ."""
    rng = np.random.default_rng(3)

    def draw(path, x):
        name, noise = path[-1].key, rng.standard_normal(x.shape, np.float32)
        if name == "kernel":
            return noise * x.shape[-2] ** -0.5
        return noise * 0.15 + (name == "scale") if name != "embed_tokens" else noise * 0.25

    shapes = jax.eval_shape(lambda: r4b.init(MODEL, jax.random.key(0)))
    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes))


@pytest.fixture(scope="session")
def logps_of():
    """(params, batch, never=()) -> token_logps of MODEL at every place, float32[B, T]."""

    @functools.partial(jax.jit, static_argnames="never")
    def logps_of(params, batch, never=()):
        batch = dataclasses.replace(batch, loss_weights=jnp.ones(batch.tokens.shape))
        return token_logps(r4b.bind(MODEL, params), batch, MODEL.loss_chunk, never)

    return logps_of


@pytest.fixture(scope="session")
def logits_of():
    """(params, batch, never=()) -> logits of each place's prediction, float32[B, T, V]."""

    @functools.partial(jax.jit, static_argnames="never")
    def logits_of(params, batch, never=()):
        model = r4b.bind(MODEL, params)
        hidden = model.hidden(batch)
        hidden = jnp.take_along_axis(hidden, batch.predecessors[..., None], 1)
        return ban(model.language_model.logits(hidden), never)

    return logits_of


@pytest.fixture(scope="session")
def tiny():
    """`get_config` of configs/tiny.py, the file itself: the package never imports configs."""
    return runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]
