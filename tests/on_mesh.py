"""One device against many: run by tests/test_mesh.py, in processes of its own.

    python tests/on_mesh.py STEP data,fsdp,tensor ...       eight devices in one process
    python tests/on_mesh.py STEP data,fsdp,tensor --process=0 --port=1234   two processes, 4 each

STEP is supervised, bpo, rollouts, checkpoint or loading. Ends with an assertion where something
differs.
"""

import argparse
import functools
import os
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from r4b_jax import config as c  # noqa: E402
from r4b_jax.common import processes, sharding  # noqa: E402
from r4b_jax.common.arrays import Batch, ImagePlan  # noqa: E402
from r4b_jax.common.checkpoint import StageCheckpoints  # noqa: E402
from r4b_jax.data.loader import Loader  # noqa: E402
from r4b_jax.data.tokenizer import train_tokenizer  # noqa: E402
from r4b_jax.data.worlds import corpus  # noqa: E402
from r4b_jax.decoding.generate import Ids, for_generation, forced_array, generate  # noqa: E402
from r4b_jax.decoding.prompts import Prompts  # noqa: E402
from r4b_jax.decoding.sampling import Sampling  # noqa: E402
from r4b_jax.models import block_attention, packed_attention, r4b  # noqa: E402
from r4b_jax.models.layers import logical_axes  # noqa: E402
from r4b_jax.rl.rollout import RolloutBatch  # noqa: E402
from r4b_jax.rl.update import make_update  # noqa: E402
from r4b_jax.training.losses import supervised_loss  # noqa: E402
from r4b_jax.training.optimizer import stage_optimizer, trainable  # noqa: E402
from r4b_jax.training.step import accumulate, init_state, make_train_step  # noqa: E402

packed_attention.SHORT, block_attention.BLOCK = 16, 16  # rows of this length go block by block
ROWS, LENGTH, TILES, NEW = 8, 56, 2, 6
# Sizes that the meshes divide, no two alike.
MODEL = c.ModelConfig(
    vision=c.VisionConfig(
        image_size=8,
        patch_size=4,
        width=24,
        num_layers=2,
        num_heads=4,
        mlp_dim=40,
        grid_pinpoints=(),
    ),
    language=c.LanguageConfig(
        vocab_size=304,
        width=32,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=6,
        mlp_dim=48,
    ),
    compute_dtype="float32",
    loss_chunk=16,
)
STAGE = c.StageConfig(batch_rows=ROWS, num_steps=9, lr_projector=1e-3, lr_language=1e-3)
BPO = c.BPOConfig(kl_beta=0.3)
NEVER = (7, 290)


def params() -> dict:
    """Random, with no zero biases."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: r4b.init(MODEL, jax.random.key(0)))
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32) + 0.1, shapes)


def batch(seed: int = 1) -> Batch:
    """Rows of two segments, each a prompt with a picture and two branches, and some padding."""
    rng, ids = np.random.default_rng(seed), np.zeros((4, ROWS, LENGTH), np.int32)
    segments, branches, positions, before = ids
    weight = np.zeros((ROWS, LENGTH, 4), np.float32)
    index = np.zeros((ROWS, LENGTH, 4), np.int32)
    for row in range(ROWS):
        at = 0
        for segment in (1, 2):
            prompt = at
            for branch, size in enumerate(rng.integers(6, 9, 3)):
                span = slice(at, at + size)
                segments[row, span], branches[row, span] = segment, branch
                first = 0 if branch == 0 else positions[row, prompt:at].max(initial=0) + 1
                positions[row, span] = first + np.arange(size)
                before[row, span] = np.maximum(np.arange(at - 1, at + size - 1), prompt)
                at += size
            weight[row, prompt + 1 : prompt + 5] = rng.random((4, 4))
            index[row, prompt + 1 : prompt + 5] = rng.integers(0, TILES * 4 + 1, (4, 4))
    many = np.arange(ROWS)[:, None] >= ROWS // 2  # the other rows need fewer chunks of logits
    needed = (branches > 0) & ((np.arange(LENGTH) < 14) | many)
    return Batch(
        tokens=rng.integers(8, 280, (ROWS, LENGTH)).astype(np.int32),
        positions=positions,
        segment_ids=segments,
        branch_ids=branches,
        loss_weights=(rng.random((ROWS, LENGTH)) * needed).astype(np.float32),
        predecessors=before,
        tiles=rng.integers(0, 256, (ROWS, TILES, 8, 8, 3)).astype(np.uint8),
        plan=ImagePlan(index, weight),
    )


def supervised(params):
    """Loss, weight and gradients of a batch with pictures, in two micro-batches."""

    @jax.jit
    def run(params, batch):
        def loss_of(params, batch):
            return supervised_loss(r4b.bind(MODEL, params), batch, MODEL.loss_chunk)

        return accumulate(loss_of, params, batch, 2 // max(1, sharding.row_shards() // 4))

    return run(params, sharding.place_rows(batch()))


def bpo(params):
    """Gradients of a BPO update with its KL, log-probabilities and metric sums."""
    rng = np.random.default_rng(2)
    rollout = rng.integers(0, 16, (ROWS, LENGTH)).astype(np.int32)
    logps = -rng.random((ROWS, LENGTH)).astype(np.float32)
    flags = rng.random((2, ROWS, LENGTH)) < 0.3
    rollouts = sharding.place_rows(RolloutBatch(batch(), rollout, logps, *flags))
    parts = make_update(c.Config(model=MODEL, bpo=BPO), NEVER)
    reference = parts.reference(jax.tree.map(lambda x: x + 0.02, params), rollouts)
    advantages = rng.standard_normal(16).astype(np.float32)
    grads, logps, sums = parts.gradients(
        params, {}, rollouts, advantages, reference, rollouts.sampler_logps, True, 16.0
    )
    return grads, jnp.where(rollouts.batch.loss_weights > 0, logps, 0), sums


def rollouts(params, tensor: int):
    """Sampled replies, with pictures, more queries than slots."""
    rng, length, queries = np.random.default_rng(3), 24, 16
    plan = ImagePlan(
        rng.integers(0, TILES * 4 + 1, (queries, length, 4)).astype(np.int32),
        (rng.random((queries, length, 4)) * (np.arange(length) < 9)[:, None]).astype(np.float32),
    )
    prompts = Prompts(
        rng.integers(8, 280, (queries, length)).astype(np.int32),
        rng.integers(12, length, queries).astype(np.int32),
        rng.integers(0, 256, (queries, TILES, 8, 8, 3)).astype(np.uint8),
        plan,
    )
    forced = forced_array([[2], [2], [3, 4], []], queries)
    keys = jax.random.split(jax.random.key(4), (queries, 4))
    with sharding.for_rollouts(tensor):
        out = generate(
            MODEL,
            for_generation(MODEL, params),
            *sharding.place_rows((prompts, forced, keys)),
            Ids(end=11, pad=0, thinking=2, direct=3, end_think=4, never=NEVER),
            max_new_tokens=NEW,
            sampling=Sampling.of(1.0),
            queries_at_once=1,
            rollouts_at_once=2,
        )
    return {name: getattr(out, name) for name in ("tokens", "logps", "lengths", "mode_logps")}


def checkpoint(params, folder: str):
    """Two steps of a stage from the checkpoint in `folder` if there is one, else one step and the
    checkpoint of it: the parameters."""
    state = init_state(params, stage_optimizer(STAGE), trainable(STAGE))
    step, checkpoints = make_train_step(MODEL, STAGE), StageCheckpoints(folder)
    state = jax.tree.map(jnp.array, state)
    if checkpoints.latest is None:
        state, _ = step(state, sharding.place_rows(batch(5)))
        checkpoints.save(state, {"position": 17})
    else:
        old = jax.tree.map(lambda x: x.sharding, state)
        state, data = checkpoints.restore(state)
        assert data == {"position": 17}
        assert old == jax.tree.map(lambda x: x.sharding, state)
    checkpoints.close()
    state, metrics = step(state, sharding.place_rows(batch(6)))
    return state.params, metrics["loss"]


def loading(params):
    """The first batches of a stage. Each process decodes the pictures of its own rows alone."""
    world = {"world": c.SourceConfig(path="world")}
    mixture = {"maths": (1.0, 1.0), "vqa": (1.0, 0.0)}
    stage = c.StageConfig(mixture=mixture, batch_rows=ROWS, packed_len=150, packed_tiles=3)
    config = c.Config(model=MODEL, sources=world, annealing=stage)
    tokenizer = train_tokenizer(corpus(config.world, 200), 300)
    batches = Loader(config, "annealing", tokenizer).batches()
    taken = [next(batches).batch for _ in range(2)]
    batches.close()
    own = sharding.own_rows(ROWS)
    for one in taken:
        seen = one.tiles.any((1, 2, 3, 4))
        assert seen[own].all() and not seen[~own].any()
    shared = jax.process_count() if sharding.current() is not None else 1
    assert own.sum() == ROWS // shared
    return [jax.tree.map(jnp.asarray, sharding.place_rows(one)) for one in taken]


def close(one, many):
    """Equal leaf by leaf to 1e-5 of the leaf's largest number (of 1 at the least: gradients that
    are 0 but for rounding, as that of a bias of keys)."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(many)):
        limit = 1e-5 * max(float(np.abs(x).max()), 1.0)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(y, x, rtol=0, atol=limit, err_msg=name)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("step", choices=("supervised", "bpo", "rollouts", "checkpoint", "loading"))
    p.add_argument("meshes", nargs="+")
    p.add_argument("--process", type=int)
    p.add_argument("--port", type=int)
    args = p.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_num_cpu_devices", 8 if args.process is None else 4)
    folder = tempfile.mkdtemp()
    if args.process is not None:
        processes.start(f"localhost:{args.port}", 2, args.process)
    step = globals()[args.step]
    if args.step == "checkpoint":
        step = functools.partial(step, folder=folder)
    whole = params()
    with jax.default_device(jax.local_devices()[0]):
        alone = functools.partial(step, tensor=1) if args.step == "rollouts" else step
        one = jax.device_get(alone(jax.tree.map(jnp.asarray, whole)))
    for sizes in args.meshes:
        data, fsdp, tensor = map(int, sizes.split(","))
        run = functools.partial(step, tensor=tensor) if args.step == "rollouts" else step
        with jax.set_mesh(sharding.training_mesh(c.MeshConfig(data, fsdp, tensor))):
            many = run(sharding.place(whole, logical_axes))
            split = [x for x in jax.tree.leaves(many) if not x.sharding.is_fully_replicated]
            assert len(split) > 3 or (fsdp, tensor) == (1, 1), "nothing is split"
            close(one, processes.fetch(many))
        print(args.step, sizes, "agrees", flush=True)


if __name__ == "__main__":
    sys.exit(main())
