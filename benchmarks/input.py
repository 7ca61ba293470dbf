"""The input of training, without the training: packed rows of 384-pixel tiles, beside torch's
DataLoader with transformers' LlavaOnevisionProcessor, which does the same work on the same records.

    python benchmarks/input.py                                    ours and both of torch's
    python benchmarks/input.py --torch-python=venv-trl/bin/python
    python benchmarks/input.py --tokenizer=qwen3/tokenizer.json --folder=/tmp/input
    python benchmarks/input.py --side=r4b_jax --folder=/tmp/input            one side alone

It makes pictures that cost what photographs cost, and conversations in LLaVA's JSON: a fifth
without a picture, a third with a thought, some of several turns. All sides read them from the disk
in one order, on the same cores and with as many workers, and go through them once. Sides take
turns, each in a process of its own, and ratios are taken within a round.

    r4b_jax          rows packed to --packed-len
    r4b_jax, N rows  the same with N rows a batch
    torch            a batch of as many samples as our row has, padded to its longest
    torch, packed    samples one after another until --packed-len is full, as people do by hand

transformers' default is its processor for torchvision where that is installed, and else the one
for Pillow, whose pixels ours equal: where there are two, both are sides. Before the clock runs,
each side tells the pixels of the first pictures, and afterwards the numbers of samples, tiles and
picture tokens, which must agree. torch's labels are the cheapest there are, the tokens themselves
but those of pictures; ours carry loss on replies alone. torch's pixels are normalised float32; ours
are uint8, and normalised on the device.

In the end both feed a loop that does nothing but sleep, for so long as our batch takes to be made,
and for --steps times as long: the share of a step spent waiting. The last line is JSON.
"""

import argparse
import contextlib
import glob
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib

import compare
import measure
import numpy as np
from PIL import Image

# r4b_jax, torch and rich are imported where they are used: each side lacks the others'.

SIZES = ((640, 480), (480, 640), (500, 375), (375, 500), (336, 336), (800, 600), (1024, 768))
SIZES += ((640, 427), (1200, 900))  # width and height; as often as they stand here
TEXT_ONLY, THINKING, TURNS = 0.2, 1 / 3, (0.8, 0.1, 0.06, 0.04)  # shares; of 1, 2, ... turns
VOCABULARY = 8192  # of the tokenizer that is trained where none is given
CHECKED = 8  # pictures whose pixels are compared
SOURCE = "made"
MEAN = STD = [0.5, 0.5, 0.5]
TEMPLATE = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- for part in m.content %}
{{- '<image>\\n' if part.type == 'image' else part.text }}
{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"""


# What all sides read


def make(folder: str, count: int, tokenizer: str | None):
    """Pictures, records, the order they come in, and the tokenizer; what is there already stays."""
    from pydoc_data.topics import topics  # half a million characters of English that Python ships

    from r4b_jax import config as c
    from r4b_jax.data.mixture import stage_stream

    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    text = "\n".join(topics[name] for name in sorted(topics))
    _make_tokenizer(os.path.join(folder, "tokenizer.json"), tokenizer, text)
    rng, fields, words = np.random.default_rng(0), None, text.split()
    with open(os.path.join(folder, "records.jsonl"), "w", encoding="utf-8") as f:
        for i in range(count):
            record = {"id": str(i), "conversations": _conversation(rng, words)}
            if rng.random() >= TEXT_ONLY:
                first, record["image"] = record["conversations"][0], f"images/{i}.jpg"
                first["value"] = "<image>\n" + first["value"]
                path = os.path.join(folder, record["image"])
                width, height = SIZES[rng.integers(len(SIZES))]
                shift = rng.integers(0, 1200, 2)
                if not os.path.exists(path):
                    fields = fields or [_photograph(seed) for seed in range(4)]
                    pixels = np.roll(fields[i % 4], shift, (0, 1))[:height, :width]
                    Image.fromarray(np.ascontiguousarray(pixels)).save(path, quality=90)
            f.write(json.dumps(record) + "\n")
    stream, bad = stage_stream(our_config(c, folder, 1, 1, 1, 1), "annealing", "")
    assert not bad
    order = [int(stream[i].id.removeprefix(SOURCE + "/")) for i in range(count)]
    with open(os.path.join(folder, "order.json"), "w") as f:
        json.dump(order, f)


def _make_tokenizer(path: str, given: str | None, text: str):
    """The given tokenizer with a token `<image>`, or one trained on the text."""
    from r4b_jax.data.tokenizer import IMAGE, train_tokenizer

    if given is None:
        if os.path.exists(path):
            return
        train_tokenizer(text.split("\n\n"), VOCABULARY).save(os.path.dirname(path))
        return
    with open(given, encoding="utf-8") as f:
        spec = json.load(f)
    added = spec["added_tokens"]
    if not any(token["content"] == IMAGE for token in added):
        last = max(added, key=lambda token: token["id"])
        added.append({**last, "id": last["id"] + 1, "content": IMAGE, "special": True})
    with open(path, "w", encoding="utf-8") as f:
        json.dump(spec, f)


def _photograph(seed: int, side: int = 1200) -> np.ndarray:
    """uint8[side, side, 3] with the spectrum of photographs: amplitudes fall as 1 / frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf
    planes = []
    for spread, middle in ((50, 118), (14, 128), (14, 128)):  # brightness and two of colour
        noise = rng.standard_normal((2, *frequency.shape))
        plane = np.fft.irfft2((noise[0] + 1j * noise[1]) / frequency**1.2, s=(side, side))
        planes.append(np.clip(plane / plane.std() * spread + middle, 0, 255))
    pixels = np.stack(planes, -1).astype(np.uint8)
    return np.asarray(Image.fromarray(pixels, "YCbCr").convert("RGB"))


def _conversation(rng: np.random.Generator, words: list[str]) -> list[dict]:
    """Turns in LLaVA's JSON: words, sentences and paragraphs; the last one may think before."""

    def some(low: int, high: int) -> str:
        count = int(rng.integers(low, high))
        start = int(rng.integers(len(words) - count))
        return " ".join(words[start : start + count]).replace("<", " ")

    said, turns = [], 1 + int(rng.choice(len(TURNS), p=TURNS))
    for turn in range(turns):
        low, high = ((1, 4), (8, 40), (80, 250))[rng.choice(3, p=(0.4, 0.35, 0.25))]
        answer = some(low, high)
        if turn == turns - 1 and rng.random() < THINKING:
            length = int(np.clip(rng.lognormal(np.log(350), 0.8), 30, 3000))
            answer = f"<think>\n{some(length, length + 1)}\n</think>\n\n{answer}"
        said.append({"from": "human", "value": some(5, 40)})
        said.append({"from": "gpt", "value": answer})
    return said


# The sides. Each gives (checksums of the first pictures' pixels, batches as what they hold)


def our_config(c, folder: str, rows: int, length: int, tiles: int, workers: int):
    """One stage that goes through the records once."""
    stage = c.StageConfig(epochs=1, batch_rows=rows, packed_len=length, packed_tiles=tiles)
    source = c.SourceConfig(path=os.path.join(folder, "records.jsonl"))
    return c.Config(sources={SOURCE: source}, annealing=stage, workers=workers)


def ours(args):
    from r4b_jax import config as c
    from r4b_jax.data import images
    from r4b_jax.data.loader import Loader
    from r4b_jax.data.tokenizer import Tokenizer

    with open(os.path.join(args.folder, "tokenizer.json"), encoding="utf-8") as f:
        tokenizer = Tokenizer(f.read())
    sizes = (args.rows, args.packed_len, args.packed_tiles, args.workers)
    config = our_config(c, args.folder, *sizes)
    vision = config.model.vision
    loader = Loader(config, "annealing", tokenizer)

    def batches():
        for packed in loader.batches():
            batch = packed.batch
            real = batch.segment_ids > 0
            shown = (batch.plan.index < args.packed_tiles * vision.num_patches) * batch.plan.index
            yield dict(
                samples=int(batch.segment_ids.max(1).sum()),
                tokens=int(real.sum()),
                slots=real.size,
                picture_tokens=int((batch.tokens[real] == tokenizer.image_id).sum()),
                tiles=sum(
                    1 + last // vision.num_patches for last in shown.max((1, 2)).tolist() if last
                ),
                pixel_bytes=batch.tiles.nbytes,
                ends=packed.position.counter >= len(loader.examples),
            )

    return checksums(args, lambda path: images.prepare([path], vision)[0].tiles), batches()


def checksums(args, tiles_of) -> list[int]:
    """Of the pixels of the first pictures."""
    paths = sorted(glob.glob(os.path.join(args.folder, "images", "*.jpg")))[:CHECKED]
    return [zlib.crc32(np.ascontiguousarray(tiles_of(path)).data) for path in paths]


def torchs(args):
    import torch

    processor = make_processor(args)
    records = Records(args.folder, processor)

    def padded(items: list[dict]) -> dict:
        return collate(torch, processor, items)

    if args.packed:
        items = torch.utils.data.DataLoader(
            records, None, num_workers=args.workers, prefetch_factor=8
        )
        made = (joined(torch, processor, row, args.packed_len) for row in rows_of(items, args))
    else:
        made = torch.utils.data.DataLoader(
            records, args.batch_samples, num_workers=args.workers, collate_fn=padded
        )

    def batches():
        for batch in made:
            real = batch["attention_mask"] > 0
            pixels = batch.get("pixel_values")
            yield dict(
                samples=batch["samples"],
                tokens=int(real.sum()),
                slots=real.numel(),
                picture_tokens=int((batch["input_ids"] == processor.image_token_id).sum()),
                tiles=batch["tiles"],
                pixel_bytes=0 if pixels is None else pixels.nbytes,
                ends=False,
            )

    def tiles_of(path: str) -> np.ndarray:
        values = processor.image_processor([Image.open(path)], return_tensors="np")
        levels = np.rint((values["pixel_values"][0] * STD[0] + MEAN[0]) * 255)
        return levels.astype(np.uint8).transpose(0, 2, 3, 1)

    return checksums(args, tiles_of), batches()


def make_processor(args):
    """transformers' processor at R-4B's sizes, which are its own defaults."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.llava_onevision import processing_llava_onevision

    if args.torchvision:
        from transformers import LlavaOnevisionImageProcessor as Images
    else:
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil as Images,
        )

    class Processor(processing_llava_onevision.LlavaOnevisionProcessor):
        def check_argument_for_proper_class(self, name, value):
            """Of videos there is none, and looking for its class needs torchvision."""
            return type(value)

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=os.path.join(args.folder, "tokenizer.json"),
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    return Processor(
        Images(image_mean=MEAN, image_std=STD),
        tokenizer,
        num_image_tokens=(384 // 14) ** 2,
        vision_feature_select_strategy="full",
    )


class Records:
    """A dataset as torch's DataLoader takes them: a record a sample, read and processed."""

    def __init__(self, folder: str, processor):
        self.folder, self.processor = folder, processor
        with open(os.path.join(folder, "records.jsonl"), encoding="utf-8") as f:
            lines = f.readlines()
        with open(os.path.join(folder, "order.json")) as f:
            self.lines = [lines[i] for i in json.load(f)]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> dict:
        record = json.loads(self.lines[i])
        messages, pictures = [], None
        for message in record["conversations"]:
            text, parts = message["value"], []
            if "<image>" in text:
                text, parts = text.removeprefix("<image>\n"), [{"type": "image"}]
            role = {"human": "user", "gpt": "assistant"}[message["from"]]
            messages.append({"role": role, "content": [*parts, {"type": "text", "text": text}]})
        if "image" in record:
            pictures = [Image.open(os.path.join(self.folder, record["image"])).convert("RGB")]
        text = self.processor.tokenizer.apply_chat_template(messages, tokenize=False)
        inputs = self.processor(images=pictures, text=text, return_tensors="pt")
        ids = inputs["input_ids"][0]
        labels = ids.masked_fill(ids == self.processor.image_token_id, -100)
        item = {"input_ids": ids, "labels": labels}
        return item | ({"pixel_values": inputs["pixel_values"][0]} if pictures else {})


def collate(torch, processor, items: list[dict]) -> dict:
    """Samples padded to the longest, and their tiles to the most of one picture, as transformers'
    model takes them."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids, labels = ([item[key] for item in items] for key in ("input_ids", "labels"))
    pixels = [item["pixel_values"] for item in items if "pixel_values" in item]
    batch = {
        "input_ids": pad(ids, True, processor.tokenizer.pad_token_id),
        "labels": pad(labels, True, -100),
        "attention_mask": pad([torch.ones_like(x) for x in ids], True),
        "tiles": sum(map(len, pixels)),
        "samples": len(items),
    }
    return batch | ({"pixel_values": pad(pixels, True)} if pixels else {})


def rows_of(items, args):
    """Lists of samples whose tokens fit a row together, in order."""
    row, used = [], 0
    for item in items:
        if used + len(item["labels"]) > args.packed_len:
            yield row
            row, used = [], 0
        row.append(item)
        used += len(item["labels"])
    yield row


def joined(torch, processor, items: list[dict], length: int) -> dict:
    """Samples one after another in one row."""

    def line(parts, value: int):
        whole = torch.cat(parts)
        return torch.nn.functional.pad(whole, (0, length - len(whole)), value=value)[None]

    ids, labels = ([item[key] for item in items] for key in ("input_ids", "labels"))
    pixels = [item["pixel_values"] for item in items if "pixel_values" in item]
    batch = {
        "input_ids": line(ids, processor.tokenizer.pad_token_id),
        "labels": line(labels, -100),
        "attention_mask": line([torch.full_like(x, i + 1) for i, x in enumerate(ids)], 0),
        "tiles": sum(map(len, pixels)),
        "samples": len(items),
    }
    return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})


# The clock


def run(args) -> dict:
    """One side, in this process: all records once, a step that sleeps after each batch."""
    pixels, batches = (ours if args.side == "r4b_jax" else torchs)(args)
    total, waits, step = {}, [], args.step_seconds
    whole, children = [], resource.getrusage(resource.RUSAGE_CHILDREN)
    with Memory() as memory, measure.Clock() as clock:
        begin = time.perf_counter()
        for batch in batches:
            waits.append(time.perf_counter() - begin)
            if not batch.pop("ends"):  # rows that the end of the data left open are not counted
                whole.append((batch["tokens"], batch["slots"]))
            for key, value in batch.items():
                total[key] = total.get(key, 0) + value
            time.sleep(step)
            begin = time.perf_counter()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = clock.cpu + sum(
        getattr(after, t) - getattr(children, t) for t in ("ru_utime", "ru_stime")
    )
    waited = sum(waits[1:])  # the first batch is waited for once in a training
    full = sum(tokens for tokens, _ in whole) / max(sum(slots for _, slots in whole), 1)
    result = dict(batches=len(waits), wall_s=clock.wall, cpu_s=cpu, peak_gb=memory.peak / 2**30)
    share = waited / max(waited + step * (len(waits) - 1), 1e-9)
    return total | result | dict(full=full, waited_share=share, pixels=pixels)


class Memory:
    """The peak of what this process and its children hold; what they share counts once."""

    def __enter__(self):
        self.peak, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    def _watch(self):
        while not self.done.wait(0.25):
            self.peak = max(self.peak, sum(map(_held, _family())))


def _family() -> list[int]:
    """This process and all that descend from it."""
    parents = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path) as f:
            number, rest = f.read().split(" (", 1)
            parents[int(number)] = int(rest.rsplit(") ", 1)[1].split()[1])
    family = [os.getpid()]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def _held(process: int) -> int:
    """Bytes of a process, its part of what it shares."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/smaps_rollup") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith("Pss:"))
    return 0


# The comparison


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--samples", type=int, default=400, help="records, made anew (400)")
    add("--folder", help="where they are kept and looked for; without it a temporary one")
    add("--tokenizer", help="a tokenizer.json, such as Qwen3's; else one trained on the text")
    add("--torch-python", default=sys.executable, help="Python with torch and transformers")
    add("--workers", type=int, default=2, help="threads of ours, processes of torch's (2)")
    add("--cores", type=int, default=2, help="cores that a side has (2)")
    add("--rows", type=int, nargs="+", default=[1, 4, 8], help="rows of our batches (1 4 8)")
    add("--packed-len", type=int, default=16384, help="tokens a row (16384)")
    add("--packed-tiles", type=int, default=32, help="tiles a row of ours (32)")
    add("--rounds", type=int, default=3, help="each side runs once in each (3)")
    text = "a step's seconds, in those that our batch takes to be made (1 1.5 3); 0 = none"
    add("--steps", type=float, nargs="+", default=[1, 1.5, 3], help=text)
    add("--side", choices=("r4b_jax", "torch"), help="one side alone, in this process")
    add("--packed", action="store_true", help="with --side=torch: packed by hand")
    add("--torchvision", action="store_true", help="with --side=torch: torchvision's processor")
    add("--batch-samples", type=int, default=4, help="with --side=torch: samples a batch (4)")
    add("--step-seconds", type=float, default=0, help="with --side: after each batch (0)")
    return p


def start(args, python: str, *flags: str) -> dict:
    """One side in a process of its own."""
    names = ("folder", "workers", "packed_len", "packed_tiles")
    shared = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    return compare.run_side([python, os.path.abspath(__file__), *shared, *flags])


def sides_of(args, batch_samples: int) -> dict[str, tuple]:
    """{name: its Python and flags}; ours come first."""
    sides = {}
    for rows in sorted({1, *args.rows}):
        name = "r4b_jax" + (f", {rows} rows" if rows > 1 else "")
        sides[name] = (sys.executable, "--side=r4b_jax", f"--rows={rows}")
    torch = (args.torch_python, "--side=torch", f"--batch-samples={batch_samples}")
    sides |= {"torch": torch, "torch, packed": (*torch, "--packed")}
    look = [args.torch_python, "-c", "import torchvision"]
    if subprocess.run(look, capture_output=True).returncode == 0:
        sides["torch, torchvision"] = (*torch, "--torchvision")
        sides["torch, torchvision, packed"] = (*torch, "--torchvision", "--packed")
    return sides


def check(name: str, result: dict, first: dict):
    """The sides did the same work, or the numbers mean nothing."""
    for key in ("samples", "tiles", "picture_tokens"):
        if result[key] != first[key]:
            sys.exit(f"{name}: {result[key]} {key}, r4b_jax {first[key]}")
    if "torchvision" not in name and result["pixels"] != first["pixels"]:
        sys.exit(f"{name}: other pixels than r4b_jax's")


def show(title: str, columns: list[str], rows: list[list[str]]):
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def speeds(args, sides: dict[str, tuple]) -> dict[str, list[dict]]:
    """Rounds of all sides as fast as they can, shown as a table."""
    results = {name: [] for name in sides}
    for number in range(args.rounds):
        for name, (python, *flags) in sides.items():
            results[name].append(start(args, python, *flags))
            check(name, results[name][-1], results["r4b_jax"][0])
            speed = results[name][-1]["samples"] / results[name][-1]["wall_s"]
            print(f"round {number + 1}, {name}: {speed:.1f} samples/s", flush=True)
    rows = []
    for name, runs in results.items():

        def median(value, runs=runs) -> float:
            return statistics.median(map(value, runs))

        def times_slower(key: str, runs=runs) -> float:
            ratios = [run[key] / base[key] for run, base in zip(runs, results["r4b_jax"])]
            return statistics.median(ratios)

        rows.append(
            [
                name,
                f"{median(lambda r: r['samples'] / r['wall_s']):.1f}",
                f"{median(lambda r: r['tokens'] / r['wall_s']):,.0f}",
                f"{median(lambda r: r['tiles'] / r['wall_s']):.0f}",
                f"{median(lambda r: r['pixel_bytes'] / r['wall_s'] / 1e6):.0f}",
                f"{100 * median(lambda r: r['full']):.1f}",
                f"{1000 * median(lambda r: r['cpu_s'] / r['samples']):.0f}",
                f"{median(lambda r: r['peak_gb']):.2f}",
                f"{times_slower('wall_s'):.2f}",
                f"{times_slower('cpu_s'):.2f}",
            ]
        )
    columns = "samples/s tokens/s tiles/s MB/s full,% CPU,ms/sample peak,GiB wall,ratio CPU,ratio"
    title = f"{args.samples} samples, {args.workers} workers, {args.cores} cores, median of"
    columns = [column.replace(",", "\n") for column in columns.split()]
    show(f"{title} {args.rounds} rounds", columns, rows)
    return results


def waits(args, sides: dict[str, tuple], batch_seconds: float) -> dict[str, dict]:
    """The share of a step spent waiting, shown as a table."""
    table = {}
    for name, (python, *flags) in sides.items():
        if "rows" in name or "packed" in name:
            continue
        table[name] = {}
        for times in args.steps:
            result = start(args, python, *flags, f"--step-seconds={times * batch_seconds}")
            table[name][times] = result["waited_share"]
            print(f"steps of {times:g}, {name}: waited {result['waited_share']:.1%}", flush=True)
    columns = [f"{times:g} x = {times * batch_seconds:.3f} s" for times in args.steps]
    rows = [[name, *(f"{share:.1%}" for share in row.values())] for name, row in table.items()]
    show("share of a step spent waiting, for steps of", columns, rows)
    return table


def main():
    args = parser().parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing here is for an accelerator
    if args.side:
        args.rows = args.rows[0]
        print(json.dumps(run(args)))
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    with contextlib.ExitStack() as stack:
        if args.folder is None:
            args.folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ["XDG_CACHE_HOME"] = os.path.join(args.folder, "cache")
        make(args.folder, args.samples, args.tokenizer)
        first = start(args, sys.executable, "--side=r4b_jax", "--rows=1")
        sides = sides_of(args, round(first["samples"] / first["batches"]))
        results = speeds(args, sides)
        batch = statistics.median(r["wall_s"] / r["batches"] for r in results["r4b_jax"])
        waited = waits(args, sides, batch) if any(args.steps) else {}
    print(json.dumps({"work": "input", "sides": results, "waited": waited}))


if __name__ == "__main__":
    main()
