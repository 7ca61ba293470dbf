"""Save and restore (Orbax): a stage with its optimiser, step and position in the data; and a model
alone, with its sizes."""

import dataclasses
import json
import os

import jax
import numpy as np
import orbax.checkpoint as ocp

from r4b_jax.config import ModelConfig, from_config_dict, to_config_dict

# A converted checkpoint: its sizes, and what its Hugging Face folder held beside the weights.
MODEL_FILE, ORIGINALS = "model.json", "hugging_face"


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
        """The newest state, shaped and placed like the state `like` (numpy's arrays: on the default
        device), and its data counters."""
        restored = self.manager.restore(
            self.latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_placed(_as_tree(like))), data=ocp.args.JsonRestore()
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


def _placed(tree: dict) -> dict:
    """What to restore: shapes and dtypes of a tree, on its own shardings or the default device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(x) -> jax.ShapeDtypeStruct:
        where = getattr(x, "sharding", None) or device
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(place, tree)


def save_model(folder: str, config: ModelConfig, params: dict):
    """A model on its own: `folder`/params and `folder`/model.json, the latter last, when all is
    there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.join(os.path.abspath(folder), "params"), params)
        checkpointer.wait_until_finished()
    with open(os.path.join(folder, MODEL_FILE), "w", encoding="utf-8") as f:
        f.write(to_config_dict(config).to_json(indent=1))


def model_sizes(folder: str) -> ModelConfig:
    """The sizes of a model that `save_model` wrote."""
    with open(os.path.join(folder, MODEL_FILE), encoding="utf-8") as f:
        return from_config_dict(ModelConfig, json.load(f))


def restore_model(folder: str, abstract: dict | None = None) -> tuple[ModelConfig, dict]:
    """A model that `save_model` wrote: its sizes and its parameters.

    Args:
      abstract: ShapeDtypeStructs with the dtypes and shardings wanted, on the default device where
        they have none; None = the dtypes that were saved, there.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        path = os.path.join(os.path.abspath(folder), "params")
        if abstract is None:
            saved = checkpointer.metadata(path).item_metadata.tree
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
        return model_sizes(folder), checkpointer.restore(path, _placed(abstract))
