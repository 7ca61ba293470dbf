"""Who thinks, as the paper decided it (section 4): Qwen2.5-VL-32B answers objective queries eight
times and judges the others, a multimodal reasoning model writes the thoughts.

vllm serve Qwen/Qwen2.5-VL-32B-Instruct --port 8000        and a reasoning model on port 8001
python -m r4b_jax.curate --config=configs/curation.py --config.sources.data.path='data/*.jsonl'

Writes samples.jsonl and its pictures to runs/curation-seed0/curation. Annealing reads them with
--config.sources.data.path=that/samples.jsonl --config.sources.data.images=''
"""

import dataclasses

from r4b_jax import config as c

LOCAL = c.EndpointConfig(url="http://localhost:8000/v1", model="Qwen/Qwen2.5-VL-32B-Instruct")


def get_config():
    config = c.Config(
        name="curation",
        sources={"data": c.SourceConfig(path="data/*.jsonl", images="data/images")},
        curation=c.CurationConfig(
            # Objective topics; the judge decides all others.
            rewards={"maths": "maths", "chart": "numeric", "knowledge": "choice", "ocr": "anls"},
            right_from=0.9,  # anls calls an answer with a slip of a letter almost right
            teacher=dataclasses.replace(LOCAL, max_tokens=1024),
            judge=dataclasses.replace(LOCAL, max_tokens=512, temperature=0.0),
            reasoner=c.EndpointConfig(
                url="http://localhost:8001/v1",
                model="zai-org/GLM-4.1V-9B-Thinking",
                max_tokens=16384,
                timeout=900.0,
            ),
        ),
        generate=c.GenerateConfig(batch_size=512),  # queries decided, and written, at once
    )
    return c.to_config_dict(config)
