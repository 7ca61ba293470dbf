"""The whole recipe of R-4B on two CPU cores, from scratch, with nothing downloaded.

python -m r4b_jax.main --config=configs/tiny.py          all stages
python -m r4b_jax.main --config=configs/tiny.py:smoke    the same mechanics in a few steps
"""

import dataclasses

from r4b_jax import config as c

LR = 0.02


def stage(**settings) -> c.StageConfig:
    shape = dict(batch_rows=32, packed_len=192, packed_tiles=5)
    return c.StageConfig(optimizer="muon", adam_lr_ratio=0.2, b2=0.98, **shape, **settings)


def get_config(size: str = "full"):
    config = c.Config(
        name="tiny",
        model=c.ModelConfig(
            vision=c.VisionConfig(
                image_size=48, patch_size=16, width=96, num_layers=2, num_heads=6, mlp_dim=192
            ),
            language=c.LanguageConfig(
                vocab_size=512,
                width=96,
                num_layers=3,
                num_heads=6,
                num_kv_heads=2,
                head_dim=16,
                mlp_dim=288,
                rope_theta=5e3,
            ),
            compute_dtype="float32",
            remat=False,
            loss_chunk=2048,
        ),
        world=c.WorldConfig(vocab_size=512),
        # Stands for Qwen3: a language model that can already read, reason and answer in text.
        language=stage(
            topics={"arithmetic": 0.4, "text": 0.35, "facts": 0.25},
            format="thinking",
            num_steps=300,
            lr_language=LR,
            warmup_steps=20,
        ),
        warmup=stage(
            topics={"caption": 1.0},
            format="direct",
            num_steps=30,
            lr_projector=LR,
            warmup_steps=5,
        ),
        alignment=stage(
            topics={"caption": 0.6, "ocr": 0.2, "vqa": 0.2},
            format="direct",
            num_steps=120,
            lr_projector=LR,
            lr_vision=LR,
            warmup_steps=10,
            final_lr_ratio=0.5,
        ),
        joint=stage(
            topics={"caption": 0.2, "ocr": 0.3, "vqa": 0.3, "maths": 0.1, "compare": 0.1},
            format="direct",
            num_steps=200,
            lr_projector=LR,
            lr_vision=LR,
            lr_language=LR,
            schedule="constant",
            warmup_steps=20,
        ),
        annealing=stage(
            topics={"ocr": 0.2, "vqa": 0.2, "maths": 0.3, "arithmetic": 0.1, "compare": 0.2},
            format="bimode",
            num_steps=450,
            lr_projector=LR,
            lr_vision=LR,
            lr_language=LR,
            warmup_steps=20,
            final_lr_ratio=0.03,
        ),
        bpo=c.BPOConfig(topics={"maths": 0.6, "arithmetic": 0.4}, num_steps=80),
    )
    if size == "smoke":
        config = smoke(config)
    return c.to_config_dict(config)


def smoke(config: c.Config) -> c.Config:
    """A few steps of everything: mechanics, not quality."""
    short = dict(num_steps=4, batch_rows=4, warmup_steps=1)
    stages = {name: dataclasses.replace(getattr(config, name), **short) for name in c.STAGES}
    return dataclasses.replace(
        config,
        **stages,
        name="tiny-smoke",
        bpo=dataclasses.replace(
            config.bpo, num_steps=3, num_queries=2, g=2, eval_every=2, eval_questions=4
        ),
        generate=dataclasses.replace(config.generate, batch_size=20),
        eval_questions=8,
        log_every=2,
        checkpoint_every=2,
    )
