"""R-4B at its published sizes, with the learning rates, batches, lengths and mixtures of the paper.

A stage runs where it is given steps; its data are `config.sources` (docs/data.md), whose records
name their topics. configs/curation.py, annealing.py and bpo.py go on from here.
"""

from r4b_jax import config as c


def stage(batch_rows: int, packed_len: int, **settings) -> c.StageConfig:
    # AnyRes scales the tokens of a large page down and not its tiles (31 for 7,353 tokens), so rows
    # take more tiles than tokens alone would need: with 28 a row of 16,384 is 96 to 98 % full of
    # photographs, but a tenth of a mix with pages is set aside; with 48 nothing is, 97 % full.
    tiles = max(3 * packed_len // 1024, 37)  # the most that one picture takes
    shape = dict(batch_rows=batch_rows, packed_len=packed_len, packed_tiles=tiles)
    return c.StageConfig(**shape, **settings)


def get_config():
    config = c.Config(
        name="r4b",
        sources={"data": c.SourceConfig(path="data/*.jsonl", images="data/images")},
        # 808K captions.
        warmup=stage(
            512, 8192, mixture={"caption": (1.0, 0.0)}, mask_empty_block=True, lr_projector=1e-3
        ),
        # 25M samples: the paper's shares in per cent.
        alignment=stage(
            2048,
            16384,
            mixture={
                "ocr": (31.8, 0.0),
                "knowledge": (33.7, 0.0),
                "caption": (26.3, 0.0),
                "maths": (8.2, 0.0),
            },
            mask_empty_block=True,
            lr_projector=4e-5,
            lr_vision=4e-5,
            final_lr_ratio=0.1,
        ),
        # 37M samples, 145B tokens. The paper says no more than 13.3 % text and 22.9 % maths/K-12;
        # "general" is all the rest (ours).
        joint=stage(
            1024,
            16384,
            mixture={"text": (13.3, 0.0), "maths": (22.9, 0.0), "general": (63.8, 0.0)},
            mask_empty_block=True,
            schedule="constant",
            lr_projector=4e-6,
            lr_vision=4e-6,
            lr_language=4e-5,
        ),
        # The annealing mix in samples, direct and with reasoning. The language model's rate falls
        # to a tenth; the others' stay (Table I). One schedule a stage is what there is: theirs fall
        # too.
        annealing=stage(
            1024,
            16384,
            mixture={
                "general": (1_351_060.0, 1_365_693.0),
                "maths": (1_908_486.0, 1_821_412.0),
                "code": (643_323.0, 161_085.0),
                "chart": (1_351_060.0, 1_088_858.0),
                "ocr": (1_366_849.0, 225_146.0),
                "grounding": (280_740.0, 148_710.0),
                "caption": (1_166_676.0, 133_741.0),
                "knowledge": (928_190.0, 359_778.0),
                "text": (1_875_174.0, 190_787.0),
            },
            lr_projector=4e-6,
            lr_vision=4e-6,
            lr_language=4e-5,
            final_lr_ratio=0.1,
        ),
        bpo=c.BPOConfig(
            topics={"maths": 1.0},
            rewards={"maths": "maths"},
            g=8,
            packed_len=24576,
            packed_tiles=37,
            num_queries=64,
            eval_questions=0,
        ),
        generate=c.GenerateConfig(
            prompt_len=8192, max_new_tokens=8192, batch_size=16, queries_at_once=8
        ),
        eval_questions=0,  # the small world's questions are nothing for this model
        workers=16,
    )
    return c.to_config_dict(config)
