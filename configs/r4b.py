"""R-4B at its published sizes, with the learning rates, batches and lengths of the paper's Table I.

The stages have no steps yet: they wait for readers of people's own data (the small world of
configs/tiny.py would teach this model nothing). What works today with these sizes: conversion
(python -m r4b_jax.convert), chat, and the plan (python -m r4b_jax.plan): see configs/annealing.py.
"""

from r4b_jax import config as c


def stage(batch_rows: int, packed_len: int, **settings) -> c.StageConfig:
    tiles = packed_len // 729 + 1
    shape = dict(batch_rows=batch_rows, packed_len=packed_len, packed_tiles=tiles)
    return c.StageConfig(**shape, **settings)


def get_config():
    config = c.Config(
        name="r4b",
        warmup=stage(512, 8192, format="direct", lr_projector=1e-3),
        alignment=stage(
            2048, 16384, format="direct", lr_projector=4e-5, lr_vision=4e-5, final_lr_ratio=0.1
        ),
        joint=stage(
            1024,
            16384,
            format="direct",
            schedule="constant",
            lr_projector=4e-6,
            lr_vision=4e-6,
            lr_language=4e-5,
        ),
        # The language model's rate falls to a tenth; the others' stay (Table I). One schedule a
        # stage is what there is: theirs fall too.
        annealing=stage(
            1024,
            16384,
            format="bimode",
            lr_projector=4e-6,
            lr_vision=4e-6,
            lr_language=4e-5,
            final_lr_ratio=0.1,
        ),
        bpo=c.BPOConfig(g=8, packed_len=24576, packed_tiles=37, num_queries=64),
        generate=c.GenerateConfig(
            prompt_len=8192, max_new_tokens=8192, batch_size=16, queries_at_once=8
        ),
    )
    return c.to_config_dict(config)
