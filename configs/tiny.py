"""The whole recipe of R-4B on two CPU cores, from scratch, with nothing downloaded.

python -m r4b_jax.main --config=configs/tiny.py          all stages
python -m r4b_jax.main --config=configs/tiny.py:smoke    the same mechanics in a few steps
"""

import dataclasses

from r4b_jax import config as c

LR = 0.02


def stage(**settings) -> c.StageConfig:
    shape = dict(batch_rows=16, packed_len=192, packed_tiles=5, sources=("world",))
    muon = dict(optimizer="muon", adam_lr_ratio=0.2, b2=0.98)
    return c.StageConfig(**muon, **(shape | settings))


def direct(**weights: float) -> dict:
    """A mixture of direct samples."""
    return {topic: (weight, 0.0) for topic, weight in weights.items()}


def thinking(**weights: float) -> dict:
    """A mixture of samples with their working."""
    return {topic: (0.0, weight) for topic, weight in weights.items()}


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
        world=c.WorldConfig(vocab_size=512),
        sources={
            "world": c.SourceConfig(path="world"),
            "curated": c.SourceConfig(path="{workdir}/curation/samples.jsonl"),
        },
        # Stands for Qwen3: a language model that can already read, reason and calculate in text.
        language=stage(
            mixture=thinking(arithmetic=0.33, text=0.12, facts=0.13, words=0.42),
            length_power=1.0,
            num_steps=800,
            lr_language=LR,
            warmup_steps=20,
        ),
        # Stands for SigLIP2: a tower that knows what a picture shows.
        vision=stage(
            mixture=direct(caption=1.0),
            mask_empty_block=True,
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
            mixture=direct(caption=1.0),
            mask_empty_block=True,
            length_power=1.0,
            num_steps=40,
            lr_projector=LR,
            warmup_steps=5,
        ),
        alignment=stage(
            mixture=direct(caption=0.6, ocr=0.4),
            mask_empty_block=True,
            length_power=0.5,
            num_steps=150,
            lr_projector=LR,
            lr_vision=LR / 4,
            warmup_steps=10,
            final_lr_ratio=0.5,
        ),
        joint=stage(
            mixture=direct(
                caption=0.1, ocr=0.2, vqa=0.35, words=0.05, facts=0.15, maths=0.05, compare=0.1
            ),
            mask_empty_block=True,
            length_power=0.5,
            num_steps=350,
            lr_projector=LR,
            lr_vision=LR / 4,
            lr_language=LR,
            schedule="constant",
            warmup_steps=10,
        ),
        # Who thinks in annealing: what the model of stage 3 gets wrong eight times of eight. It
        # cannot think itself; the thoughts are the world's own, through the same filters.
        curation=c.CurationConfig(
            in_run=True,
            sources=("world",),
            topics={"ocr": 0.12, "vqa": 0.25, "maths": 0.34, "arithmetic": 0.14, "compare": 0.15},
            num_queries=24000,
            rewards=dict.fromkeys(("ocr", "vqa", "maths", "arithmetic", "compare"), "exact"),
            num_traces=0,
            min_thought_words=1,
        ),
        annealing=stage(
            sources=("curated",),
            mixture={
                "ocr": (0.114, 0.006),
                "vqa": (0.237, 0.013),
                "maths": (0.21, 0.13),
                "arithmetic": (0.087, 0.053),
                "compare": (0.093, 0.057),
            },
            num_steps=900,
            lr_projector=LR,
            lr_vision=LR / 4,
            lr_language=LR,
            warmup_steps=10,
            final_lr_ratio=0.02,
        ),
        # The push on the mode token is constant under "policy", and leaks into topics that need no
        # thought: the KL ends it, also on the unrewarded queries about what is easy to see, and the
        # rate's decay leaves the rest of the model as it was (experiments/LOG.md).
        bpo=c.BPOConfig(
            sources=("world",),
            topics={"maths": 0.4, "arithmetic": 0.27, "ocr": 0.18, "vqa": 0.15},
            rewards={"maths": "maths", "arithmetic": "maths"},
            num_steps=40,
            num_queries=24,
            g=8,
            mode_weight=0.3,
            kl_beta=0.2,
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
    # Four steps learn nothing, so there is next to nothing to choose between: all of it alike.
    stages["annealing"] = dataclasses.replace(stages["annealing"], mixture={})
    return dataclasses.replace(
        config,
        **stages,
        curation=dataclasses.replace(config.curation, num_queries=40, num_answers=2),
        name="tiny-smoke",
        bpo=dataclasses.replace(
            config.bpo, num_steps=3, num_queries=2, g=2, eval_every=2, eval_questions=4
        ),
        generate=dataclasses.replace(config.generate, batch_size=20),
        eval_questions=8,
        log_every=2,
        checkpoint_every=2,
    )
