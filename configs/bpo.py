"""BPO of the full model: 8 queries a step, 16 replies to each.

python -m r4b_jax.plan --config=configs/bpo.py --topology=v5e:2x4 --program=bpo
python -m r4b_jax.plan --config=configs/bpo.py --topology=v5e:2x4 --program=rollout
"""

import pathlib
import runpy


def get_config():
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("r4b.py")))["get_config"]()
    config.name = "bpo"
    config.model.remat = "offload"
    return config
