"""Decide without labels which samples of any source need a thought, and find them one.

    python -m r4b_jax.curate --config=configs/curation.py [--workdir=DIR] [--config.seed=1] ...

`config.curation` names the sources and who is teacher, judge and reasoner: a model behind an
OpenAI-compatible endpoint each, or, without a url, the model of `config.init_from`. The dataset and
the report are written to <workdir>/curation; the same command again continues where it stopped.
"""

import contextlib

from absl import app

from r4b_jax import main as run
from r4b_jax.config import Config
from r4b_jax.rules import ROLES, check_curation


def curate(config: Config, workdir: str) -> dict:
    """Curation by itself; returns the content of its report.json.

    Raises:
      ConfigError: the settings cannot work, or `workdir` holds a run with other settings.
    """
    check_curation(config)
    run.check_rewards("curation", config.curation.rewards)
    absent = [role for role in ROLES if not getattr(config.curation, role).url]
    # Heavy imports: only now that the settings are known to be good.
    import jax

    from r4b_jax.common import processes, sharding
    from r4b_jax.common.metrics import warn
    from r4b_jax.curation import curate as flow

    mesh = sharding.training_mesh(config.mesh)
    with processes.first_goes_first("claim"):
        run.claim(config, workdir)
    with contextlib.nullcontext() if mesh.size == 1 else jax.set_mesh(mesh):
        params = tokenizer = None
        if config.init_from and absent:
            with processes.first_goes_first("tokenizer"):
                tokenizer = run.tokenizer_of(config, workdir)
            params = run.params_of(config)
        elif absent and processes.is_first():
            warn(f"there is no {' and no '.join(absent)}: no url and no config.init_from")
        return flow.curate(config, params, tokenizer, workdir)


if __name__ == "__main__":
    app.run(run.front(check_curation, curate), flags_parser=run.parse)
