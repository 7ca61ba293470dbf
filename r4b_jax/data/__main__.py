"""Look at a stage's data as it is trained on, or bring a source into one fast file.

    python -m r4b_jax.data inspect --config=configs/tiny.py [--stage=joint] [--batches=2]
    python -m r4b_jax.data convert --config=my.py --source=charts --out=charts.array_record

`inspect` prints packed batches: the mixture and what the sources hold, each row's segments, and
each segment's text, coloured by what carries loss; the tiles are written as a picture. `convert`
writes a source as `.array_record`, pictures within, where any sample is read at once.
"""

import os

from absl import app, flags, logging

from r4b_jax import main as run
from r4b_jax.config import STAGES, Config, ConfigError, from_config_dict
from r4b_jax.rules import check

_STAGE = flags.DEFINE_enum("stage", "", ("", *STAGES), "Whose data; by default the last that runs.")
_BATCHES = flags.DEFINE_integer("batches", 1, "How many batches to show.")
_SEGMENTS = flags.DEFINE_integer("segments", 12, "How many segments' text to show of each batch.")
_SOURCE = flags.DEFINE_string("source", "", "The source to convert, of config.sources.")
_OUT = flags.DEFINE_string(
    "out", "", "Where to write: inspect's picture (tiles.png) or convert's file."
)


def inspect(config: Config, stage: str, workdir: str, batches: int, segments: int, out: str):
    """Print the first batches of a stage, and write their tiles to the picture `out`."""
    from r4b_jax.common.metrics import console
    from r4b_jax.data import show
    from r4b_jax.data.loader import Loader

    tokenizer = run.tokenizer_of(config, workdir)
    loader = Loader(config, stage, tokenizer, workdir)
    settings, patches = getattr(config, stage), config.model.vision.num_patches
    console.print(
        f"stage {stage}: {settings.batch_rows} rows a batch, of {settings.packed_len} tokens and "
        f"{settings.packed_tiles} tiles"
    )
    if settings.mixture:
        console.print(show.mixture(settings))
    _tell(loader.bad)
    console.print(show.legend())
    for number, packed in enumerate(loader.batches(), 1):
        batch = packed.batch
        console.print(f"\nbatch {number}", style="bold")
        console.print(show.counts(packed, patches))
        for row in range(len(batch.tokens)):
            console.print(f"{row:>4} ", show.bar(batch, row))
        for row, one in show.segments(batch)[:segments]:
            console.print(f"\nrow {row}, segment {one}:", style="dim")
            console.print(show.segment(batch, row, one, tokenizer))
        _tell([*packed.set_aside, *packed.undecoded])
        console.print(f"\n{(batch.segment_ids > 0).mean():.1%} of the batch's slots hold tokens")
        path = out if number == 1 else f"-{number}".join(os.path.splitext(out))
        show.tiles_picture(batch, patches).save(path)
        console.print(f"tiles: {path}", markup=False)
        if number == batches:
            return


def _tell(set_aside: list):
    from r4b_jax.common.metrics import console

    for aside in set_aside:
        console.print(f"set aside: {aside.id}: {aside.reason}", style="red", markup=False)


def convert(config: Config, name: str, workdir: str, out: str):
    """Write the source `name` as the `.array_record` `out`; what cannot be read is told, and left
    out.

    Raises:
      ConfigError: there is no such source.
    """
    from r4b_jax.common.metrics import Progress, warn
    from r4b_jax.data.records import to_record
    from r4b_jax.data.samples import RecordError
    from r4b_jax.data.sources import Source, write_records

    left_out = 0
    if name not in config.sources or not out:
        known = ", ".join(config.sources) or "none"
        raise ConfigError(f"convert needs --out=FILE.array_record and --source, one of: {known}")
    source = Source(name, config.sources[name], workdir)

    def records():
        nonlocal left_out
        with Progress(f"convert {name}", len(source)) as progress:
            for i in range(len(source)):
                try:
                    yield to_record(source[i])
                except RecordError as error:
                    left_out += 1
                    warn(f"{source.locate(i)}: {error}")
                progress.advance()

    write_records(records(), out)
    print(f"{out}: {len(source) - left_out} samples, {left_out} left out")


def main(argv):
    logging.set_verbosity(logging.WARNING)
    try:
        if argv[1:] not in (["inspect"], ["convert"]):
            raise ConfigError("say inspect or convert: python -m r4b_jax.data inspect --config=...")
        config = from_config_dict(Config, run.CONFIG.value)
        workdir = run.workdir_of(config)
        os.makedirs(workdir, exist_ok=True)
        if argv[1] == "convert":
            return convert(config, _SOURCE.value, workdir, _OUT.value)
        check(config)
        running = [name for name in STAGES if getattr(config, name).num_steps > 0]
        if not (_STAGE.value or running):
            raise ConfigError("no stage has steps; say --stage")
        out = _OUT.value or os.path.join(workdir, "tiles.png")
        stage = _STAGE.value or running[-1]
        inspect(config, stage, workdir, _BATCHES.value, _SEGMENTS.value, out)
    except ConfigError as error:
        run.stop(error)


if __name__ == "__main__":
    app.run(main, flags_parser=run.parse)
