"""Qwen3 decoder: qk-norm, grouped-query attention, RoPE, SwiGLU, tied head (PAPER.md section 2)."""

import jax
from flax import nnx

from r4b_jax.common.arrays import Array
from r4b_jax.config import LanguageConfig
from r4b_jax.models import vocabulary
from r4b_jax.models.attention import rope_tables, rotate
from r4b_jax.models.layers import LayerStack, Linear, RMSNorm


class Attention(nnx.Module):
    """Projections, qk-norm and rotation; what is attended to is the caller's business."""

    def __init__(self, config: LanguageConfig, rngs: nnx.Rngs, dtype):
        width, heads, kv = config.width, config.num_heads, config.num_kv_heads
        self.heads, self.kv, self.head_dim = heads, kv, config.head_dim
        self.q_proj = Linear(width, heads * config.head_dim, rngs, dtype)
        self.k_proj = Linear(width, kv * config.head_dim, rngs, dtype)
        self.v_proj = Linear(width, kv * config.head_dim, rngs, dtype)
        self.o_proj = Linear(heads * config.head_dim, width, rngs, dtype)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def __call__(self, x: Array, rope, attend_to):
        """x [B, T, D] -> ([B, T, D], whatever `attend_to` keeps).

        `attend_to(q, k, v) -> ([B, T, N, H], kept)` does the attention.
        """
        batch, length, _ = x.shape
        q = self.q_proj(x).reshape(batch, length, self.heads, self.head_dim)
        k = self.k_proj(x).reshape(batch, length, self.kv, self.head_dim)
        v = self.v_proj(x).reshape(batch, length, self.kv, self.head_dim)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        out, kept = attend_to(q, k, v)
        return self.o_proj(out.reshape(batch, length, self.heads * self.head_dim)), kept


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LanguageConfig, rngs: nnx.Rngs, dtype):
        self.gate_proj = Linear(config.width, config.mlp_dim, rngs, dtype)
        self.up_proj = Linear(config.width, config.mlp_dim, rngs, dtype)
        self.down_proj = Linear(config.mlp_dim, config.width, rngs, dtype)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    def __init__(self, config: LanguageConfig, rngs: nnx.Rngs, dtype):
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config, rngs, dtype)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config, rngs, dtype)

    def __call__(self, x: Array, rope, attend_to):
        out, kept = self.self_attn(self.input_layernorm(x), rope, attend_to)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class Qwen3(nnx.Module):
    def __init__(self, config: LanguageConfig, rngs: nnx.Rngs, dtype, *, remat: str):
        self.config = config
        table = jax.random.normal(rngs.params(), (config.vocab_size, config.width)) * 0.02
        self.embed_tokens = nnx.Param(table)
        self.layers = LayerStack(
            lambda rngs: DecoderLayer(config, rngs, dtype),
            config.num_layers,
            rngs,
            dtype,
            remat=remat,
        )
        self.norm = RMSNorm(config.width, config.norm_eps)
        if not config.tied_head:
            self.lm_head = nnx.Param(table + 0)  # [V, D] like the table
        self.dtype = dtype

    def embed(self, tokens: Array) -> Array:
        """int32[B, T] -> [B, T, D]."""
        return vocabulary.take(self.embed_tokens[...], tokens, self.dtype)

    def __call__(self, x: Array, positions: Array, attend_to):
        """Run the decoder over whole rows.

        Args:
          x: [B, T, D] embeddings.
          positions: int32[B, T].
          attend_to: function (q [B, T, N, H], k, v [B, T, K, H]) -> ([B, T, N, H], kept).
        Returns:
          hidden [B, T, D] after the final norm, and what was kept, on a leading axis L.
        """
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        x, kept = self.layers(x, lambda layer, x: layer(x, rope, attend_to))
        return self.norm(x), kept

    def step(self, x: Array, positions: Array, attend_to, caches):
        """Run the decoder over one token a row, each layer with its own of `caches`.

        Args:
          x: [B, 1, D]; positions: int32[B, 1].
          attend_to: function (q, k, v, cache) -> ([B, 1, N, H], cache).
          caches: one for each layer.
        Returns:
          hidden [B, 1, D] after the final norm, and the new caches.
        """
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_theta)

        def run_layer(layer, x, cache):
            return layer(x, rope, lambda q, k, v: attend_to(q, k, v, cache))

        x, caches = self.layers.step(x, run_layer, caches)
        return self.norm(x), caches

    def logits(self, hidden: Array) -> Array:
        """[..., D] -> float32[..., V]; the head is the embedding table, unless untied."""
        return vocabulary.scores(hidden, self.head)

    @property
    def head(self) -> Array:
        """float32[V, D]."""
        return (self.embed_tokens if self.config.tied_head else self.lm_head)[...]
