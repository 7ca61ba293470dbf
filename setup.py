"""Packaging of r4b_jax. `pip install -e .` runs it; `pip install -e '.[dev]'` tests it."""

from setuptools import find_packages, setup

setup(
    name="r4b_jax",
    version="0.1.0",
    description="Auto-thinking vision-language models (R-4B) in JAX",
    license="Apache-2.0",
    packages=find_packages(include=["r4b_jax", "r4b_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "array_record>=0.8",
        "datasketch>=2",  # near duplicates
        "diskcache>=5.6",  # replies that were paid for
        "easy-vqa",  # 5,000 pictures and 48,248 questions of the small world (MIT)
        # flax up to 0.12.8 breaks on jax 0.11.1 and newer; later flax needs Python 3.12. jax 0.11
        # needs Python 3.12 too, so on 3.11 pip settles on jax 0.10 with flax 0.12.8 by itself.
        'flax>=0.12.8; python_version < "3.12"',
        'flax>=0.12.9; python_version >= "3.12"',
        "grain>=0.2.18",
        "httpx>=0.28",
        "jinja2",  # the chat templates of checkpoints
        "jax>=0.10.2",
        "math-verify>=0.8",  # the reward of mathematics; timeouts can be turned off since 0.8
        "matplotlib",
        "ml_collections>=1.1",
        "msgpack",
        "numpy>=2",
        "optax>=0.2.8",  # Muon with dimension numbers
        "orbax-checkpoint>=0.11",
        "pebble>=5.2",  # reward workers with a deadline
        "pillow",
        "pyarrow>=20",
        "rich",
        "safetensors>=0.5",
        "scikit-learn",  # the handwritten digits
        "starlette",
        "tenacity>=9",
        "tensorboardX",
        "tokenizers>=0.22",
        "uvicorn",
    ],
    package_data={"r4b_jax.serving": ["page.html"]},
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "aot": ["libtpu"],  # `python -m r4b_jax.plan`: the compiler for TPUs, where there is none
        "dev": [
            "hypothesis",
            "ipykernel",
            "nbclient",
            "nbformat",
            "openai",  # the client that the server is tested with
            "playwright",  # the page, where there is a Chromium
            "pre-commit",
            "pytest",
            "ruff",
            # What the parity tests compare with; also for `python -m r4b_jax.convert check`.
            "torch==2.13.0",
            "transformers>=5.23",
        ],
    },
)
