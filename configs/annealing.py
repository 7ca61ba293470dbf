"""Stage 4 of the full model, bi-mode annealing (Table I): 1,024 rows of 16,384 tokens a step.

python -m r4b_jax.plan --config=configs/annealing.py --topology=v5e:16x16 --config.mesh.data=8
"""

import pathlib
import runpy


def get_config():
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("r4b.py")))["get_config"]()
    config.name = "annealing"
    # 16.37M samples, at the 3,900 tokens a sample of stage 3 (145B tokens, 37M samples).
    config.annealing.num_steps = 3800
    config.annealing.micro_rows = 1
    return config
