"""Save and restore a stage: parameters, optimiser state, step, and the position in the data
(Orbax)."""

import dataclasses
import os

import jax
import numpy as np
import orbax.checkpoint as ocp


class StageCheckpoints:
    """The checkpoints of one stage, in `folder`/<step>.

    Args:
      folder: made if it is not there.
      keep: newest checkpoints kept.
    """

    def __init__(self, folder: str, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True
        )
        self.manager = ocp.CheckpointManager(os.path.abspath(folder), options=options)

    @property
    def latest(self) -> int | None:
        """The newest saved step, or None."""
        return self.manager.latest_step()

    def save(self, state, data: dict[str, int]):
        """Save a state (a dataclass with a `step`) and where the data stands, as counters."""
        self.manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_tree(state)),
                data=ocp.args.JsonSave(data),
            ),
        )

    def restore(self, like):
        """The newest state, shaped like the state `like`, and its data counters."""
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _as_tree(like)
        )
        restored = self.manager.restore(
            self.latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            ),
        )
        return type(like)(**restored["state"]), dict(restored["data"])

    def restore_params(self) -> dict:
        """The newest parameters alone, as numpy arrays."""
        restored = self.manager.restore(
            self.latest, args=ocp.args.Composite(state=ocp.args.StandardRestore())
        )
        return jax.tree.map(np.asarray, restored["state"]["params"])

    def close(self):
        self.manager.close()


def _as_tree(state) -> dict:
    """The fields of a dataclass, not copied."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
