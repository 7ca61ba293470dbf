"""The whole recipe of R-4B on two CPU cores, from scratch, with nothing downloaded.

python -m r4b_jax.main --config=configs/tiny.py          all stages
python -m r4b_jax.main --config=configs/tiny.py:smoke    the same mechanics in a few steps
"""

import dataclasses

from r4b_jax import config as c

LR = 0.02


def stage(**settings) -> c.StageConfig:
    shape = dict(batch_rows=16, packed_len=192, packed_tiles=5)
    muon = dict(optimizer="muon", adam_lr_ratio=0.2, b2=0.98)
    return c.StageConfig(**muon, **(shape | settings))


def get_config(size: str = "full"):
    if size not in ("full", "smoke"):
        raise ValueError(f"configs/tiny.py has the sizes full and smoke, not {size!r}")
    config = c.Config(
        name="tiny",
        model=c.ModelConfig(
            vision=c.VisionConfig(
                image_size=48,
                patch_size=16,
                width=96,
                num_layers=2,
                num_heads=6,
                mlp_dim=192,
                grid_pinpoints=(),  # one tile a picture
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
            remat="matmuls",
            loss_chunk=2048,
        ),
        world=c.WorldConfig(vocab_size=512, think_share_reasoning=0.38),
        # Stands for Qwen3: a language model that can already read, reason and calculate in text.
        language=stage(
            topics={"arithmetic": 0.33, "text": 0.12, "facts": 0.13, "words": 0.42},
            format="thinking",
            length_power=1.0,
            num_steps=800,
            lr_language=LR,
            warmup_steps=20,
        ),
        # Stands for SigLIP2: a tower that knows what a picture shows.
        vision=stage(
            topics={"caption": 1.0},
            format="direct",
            objective="caption_words",
            num_steps=900,
            batch_rows=128,
            packed_len=48,
            packed_tiles=1,
            lr_projector=LR,
            lr_vision=LR,
            warmup_steps=20,
            final_lr_ratio=0.05,
        ),
        warmup=stage(
            topics={"caption": 1.0},
            format="direct",
            length_power=1.0,
            num_steps=40,
            lr_projector=LR,
            warmup_steps=5,
        ),
        alignment=stage(
            topics={"caption": 0.6, "ocr": 0.4},
            format="direct",
            length_power=0.5,
            num_steps=150,
            lr_projector=LR,
            lr_vision=LR / 4,
            warmup_steps=10,
            final_lr_ratio=0.5,
        ),
        joint=stage(
            topics={
                "caption": 0.1,
                "ocr": 0.2,
                "vqa": 0.35,
                "words": 0.05,
                "facts": 0.15,
                "maths": 0.05,
                "compare": 0.1,
            },
            format="direct",
            length_power=0.5,
            num_steps=350,
            lr_projector=LR,
            lr_vision=LR / 4,
            lr_language=LR,
            schedule="constant",
            warmup_steps=10,
        ),
        annealing=stage(
            topics={"ocr": 0.12, "vqa": 0.25, "maths": 0.34, "arithmetic": 0.14, "compare": 0.15},
            format="bimode",
            num_steps=900,
            lr_projector=LR,
            lr_vision=LR / 4,
            lr_language=LR,
            warmup_steps=10,
            final_lr_ratio=0.02,
        ),
        # The push on the mode token is constant under "policy", and leaks into topics that need no
        # thought; the KL ends it where P(think) on maths is about 3/4, and the rate's decay leaves
        # the rest of the model as it was (experiments/LOG.md).
        bpo=c.BPOConfig(
            topics={"maths": 0.6, "arithmetic": 0.4},
            rewards={"maths": "maths", "arithmetic": "maths"},
            num_steps=40,
            num_queries=16,
            g=8,
            mode_weight=0.3,
            kl_beta=0.6,
            learning_rate=1e-4,
            final_lr_ratio=0.05,
            eval_every=10,
        ),
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
