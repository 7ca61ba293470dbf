"""The accuracy/token curve of auto mode at every `think_bias`, offline.

The mode is one token: greedy auto mode thinks if

    logit(thinking) + think_bias >= the best other logit          (equal: the lower id wins, "\\n")

and goes on as the forced mode that begins with that token. So each query has one threshold, minus
the log-odds of thinking; below it the direct answer counts and from it on the thought one:

    think_bias   ----|--------|--|-----------|---->     thresholds of four queries, sorted
    thinking       0     1      2      3       4         one run of both modes gives all five

All of it is exact where two things are certain: that the best other logit is the direct token's
(its probability is above that of all the rest together, thinking apart), and that `</think>` would
follow it unforced (its probability is above a half, or the auto run itself did not think: its own
reply then stands for what lies below the threshold). A trained model's queries all are; the share
is told.
"""

import collections
import dataclasses
import json
import math

import numpy as np

TIE = 2e-5  # logits: float32 may put thresholds nearer than this in either order; they move as one
BELOW, DIRECT, THINKING = 0, 1, 2  # auto under its threshold; the two forced modes
MODES = {"non-thinking": DIRECT, "thinking": THINKING}
RULES = ("tokens", "think_rate", "drop", "best", "bias")


@dataclasses.dataclass(frozen=True)
class Queries:
    """N queries, each answered in both forced modes. Last axis: BELOW, DIRECT, THINKING."""

    topics: np.ndarray  # str[N]
    thresholds: np.ndarray  # float64[N], greedy auto mode thinks from this bias on
    scores: np.ndarray  # float64[N, 3], 0 to 1
    tokens: np.ndarray  # float64[N, 3]
    weights: np.ndarray  # float64[N], of a query in the means
    certain: np.ndarray  # bool[N], its threshold, and its reply below it, are proven
    rows: tuple  # of N triples of records
    autos: tuple  # of N auto records, or None

    def __len__(self) -> int:
        return len(self.topics)

    def take(self, where: np.ndarray) -> "Queries":
        """Some of them: places, or a mask."""
        places = np.arange(len(self))[where]
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Queries(
            **{
                name: tuple(value[i] for i in places) if isinstance(value, tuple) else value[places]
                for name, value in values.items()
            }
        )

    def equal_topics(self) -> "Queries":
        """The same with every topic, not every query, of the same weight in the means."""
        _, inverse, counts = np.unique(self.topics, return_inverse=True, return_counts=True)
        return dataclasses.replace(self, weights=1 / counts[inverse])

    def ends(self, weights: np.ndarray | None = None) -> np.ndarray:
        """(accuracy, tokens) of the two forced modes: float64[2, 2]."""
        weights = self.weights if weights is None else weights
        both = np.stack([weights @ self.scores[:, DIRECT:], weights @ self.tokens[:, DIRECT:]], 1)
        return both / weights.sum()

    def predict(self, bias: float) -> list[dict]:
        """The record each query would have in greedy auto mode at this bias."""
        return [row[BELOW if t > bias else THINKING] for t, row in zip(self.thresholds, self.rows)]


@dataclasses.dataclass(frozen=True)
class Curve:
    """What every bias gives, in P points from the least thinking to the most."""

    bias: np.ndarray  # float64[P], one well inside the point's interval
    lowest: np.ndarray  # float64[P], biases in [lowest, highest) all give this point
    highest: np.ndarray  # float64[P]
    think_rate: np.ndarray  # float64[P]
    accuracy: np.ndarray  # float64[P]
    tokens: np.ndarray  # float64[P], mean
    ends: np.ndarray  # float64[2, 2]: accuracy and tokens of non-thinking, of thinking

    def at(self, bias: float) -> int:
        """The point that a bias gives."""
        return int(np.searchsorted(self.lowest[1:], bias, side="right"))


@dataclasses.dataclass(frozen=True)
class Resamples:
    """A curve's numbers in R resamples of its queries."""

    think_rate: np.ndarray  # float64[R, K], at K of its points
    accuracy: np.ndarray  # float64[R, K]
    tokens: np.ndarray  # float64[R, K]
    ends: np.ndarray  # float64[R, 2, 2]
    areas: np.ndarray  # float64[R, 2], as of `areas`


# Records


def read(path: str) -> list[dict]:
    """The records of a file, one in JSON a line."""
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.strip()]


def pair(records: list[dict]) -> Queries:
    """Records of the same queries in both forced modes, and in auto mode if it was run.

    A record has `topic` (or `benchmark`), `mode`, `correct` (or `score`, 0 to 1) and `tokens`; one
    of a query's has `mode_logps` (log P of the thinking and of the direct token) or, less exactly,
    `p_think`. `id` says which query it is; without one, the n-th record of a topic and mode is its
    n-th query. An auto record may have `thinks`, and the `think_bias` of its run; a non-thinking
    one `close_logp`, log P(</think>) after the direct token.

    Raises:
      ValueError: a record lacks one of these, or a query a mode.
    """
    queries, seen = collections.defaultdict(dict), collections.Counter()
    for record in records:
        topic, mode = record.get("topic", record.get("benchmark")), record.get("mode")
        if topic is None or mode not in ("auto", *MODES) or "tokens" not in record:
            raise ValueError(f"no record of an evaluation: {json.dumps(record)[:200]}")
        seen[topic, mode] += 1
        query = queries[topic, record.get("id", seen[topic, mode])]
        if mode in query:
            raise ValueError(f"{topic} {record['id']} was answered twice in mode {mode}")
        query[mode] = record
    if not queries:
        raise ValueError("there are no records")
    return _queries({name: _sides(*name, modes) for name, modes in queries.items()})


def _sides(topic: str, name, modes: dict) -> tuple:
    """(threshold, certain, (below, direct, thinking), auto) of one query."""
    missing = [mode for mode in MODES if mode not in modes]
    if missing:
        raise ValueError(f"{topic} {name} was not answered in mode {' and '.join(missing)}")
    if len({record.get("question") for record in modes.values()}) > 1:
        raise ValueError(f"{topic} {name} is not the same question in all modes")
    auto, direct, thinking = (modes.get(m) for m in ("auto", "non-thinking", "thinking"))
    logps = next((r["mode_logps"] for r in modes.values() if r.get("mode_logps")), None)
    if logps is None:
        odds = _log_odds(next((r["p_think"] for r in modes.values() if "p_think" in r), math.nan))
    else:
        odds = logps[0] - logps[1]
    if math.isnan(odds):
        raise ValueError(f"no record of {topic} {name} has mode_logps, or a P(think) that is one")
    own = auto is not None and not auto.get("thinks", auto.get("thought") is not None)
    close = math.inf if own else direct.get("close_logp", -math.inf)
    certain = logps is not None and close > -math.log(2) and _prefers_direct(*logps)
    return -odds, certain, (auto if own else direct, direct, thinking), auto


def _log_odds(p: float) -> float:
    """Of a probability; rounded to 0 or 1, no finite bias moves it."""
    if not 0 < p < 1:
        return {0.0: -math.inf, 1.0: math.inf}.get(p, math.nan)
    return math.log(p) - math.log1p(-p)


def _prefers_direct(thinking_logp: float, direct_logp: float) -> bool:
    """Whether no other token than thinking can be likelier than the direct one."""
    thinking, direct = math.exp(thinking_logp), math.exp(direct_logp)
    return direct > 1 - thinking - direct + 1e-6  # float32's own sum is not quite 1


def _queries(sides: dict) -> Queries:
    thresholds, certain, rows, autos = zip(*sides.values())
    scores = [[float(r.get("score", r.get("correct", math.nan))) for r in row] for row in rows]
    if not all(0 <= score <= 1 for row in scores for score in row):
        raise ValueError("every record has `correct`, or a `score` from 0 to 1")
    return Queries(
        topics=np.array([topic for topic, _ in sides]),
        thresholds=np.array(thresholds, np.float64),
        scores=np.array(scores),
        tokens=np.array([[float(r["tokens"]) for r in row] for row in rows]),
        weights=np.ones(len(rows)),
        certain=np.array(certain),
        rows=rows,
        autos=autos,
    )


def auto_differs(queries: Queries) -> list[int]:
    """The queries whose auto record is not what is predicted for its bias: none, if both were run
    with the same settings on the same machine."""
    out = []
    for i, (row, auto) in enumerate(zip(queries.rows, queries.autos)):
        if auto is not None:
            thinks = queries.thresholds[i] <= auto.get("think_bias", 0.0)
            said = row[THINKING if thinks else BELOW]
            if any(said.get(key) != auto.get(key) for key in ("answer", "thought", "tokens")):
                out.append(i)
    return out


# The curve


class _Steps:
    """The order in which queries begin to think, and where points lie in it."""

    def __init__(self, thresholds: np.ndarray):
        self.order = np.argsort(thresholds, kind="stable")
        ordered = thresholds[self.order]
        some = ordered[np.isfinite(ordered)]
        first = np.append(True, np.diff(some) > TIE)[: len(some)]  # of those that move as one
        places = np.flatnonzero(first)
        always = np.searchsorted(ordered, -np.inf, side="right")
        self.counts = always + np.append(places, len(some))  # queries that think, at each point
        self.lowest = np.append(-np.inf, some[np.append(places[1:], len(some)) - 1][: len(places)])
        self.highest = np.append(some[places], np.inf)

    def levels(self, queries: Queries, weights: np.ndarray) -> np.ndarray:
        """Think rate, accuracy and tokens at every point: float64[3, P]."""
        weights = weights[self.order]
        out = [self._level(weights, np.zeros(len(weights)), np.ones(len(weights)))]
        for values in (queries.scores, queries.tokens):
            values = values[self.order]
            out.append(self._level(weights, values[:, BELOW], values[:, THINKING]))
        return np.stack(out) / weights.sum()

    def _level(self, weights, below, above) -> np.ndarray:
        gained = np.append(0.0, np.cumsum(weights * (above - below)))
        return weights @ below + gained[self.counts]


def curve(queries: Queries) -> Curve:
    """Accuracy, tokens and think rate at every bias."""
    steps = _Steps(queries.thresholds)
    rate, accuracy, tokens = steps.levels(queries, queries.weights)
    bias = [_inside(low, high) for low, high in zip(steps.lowest, steps.highest)]
    return Curve(
        np.array(bias), steps.lowest, steps.highest, rate, accuracy, tokens, queries.ends()
    )


def _inside(low: float, high: float) -> float:
    """A bias of few digits well inside an interval: 0, the model as it is, where that is."""
    if low + TIE / 2 < 0 < high - TIE / 2:
        return 0.0
    if math.isinf(low) or math.isinf(high):  # an end: beyond the last query by a logit
        low, high = (high - 2, high) if math.isinf(low) else (low, low + 2)
    middle, room = (low + high) / 2, (high - low) / 4
    return next((r for d in range(8) if abs((r := round(middle, d)) - middle) <= room), middle)


def random_mixing(ends: np.ndarray, think_rate) -> np.ndarray:
    """Expected accuracy and tokens if each query thinks with this probability, whatever it asks:
    float64[2, ...]. `ends` [..., 2, 2]."""
    direct, thinking = (np.moveaxis(ends[..., i, :], -1, 0)[..., None] for i in (0, 1))
    return direct + think_rate * (thinking - direct)


def areas(think_rate, accuracy, tokens, ends) -> np.ndarray:
    """How much more accurate than random mixing, on the mean over the curve: at the same think
    rate, and at the same tokens (nan where thinking takes no more tokens). Between two points, one
    mixes."""
    above = accuracy - random_mixing(ends, think_rate)[0]
    span = think_rate[-1] - think_rate[0]
    (direct, short), (thinking, long) = ends
    out = [np.trapezoid(above, think_rate) / span if span else math.nan, math.nan]
    if long > short and span:
        line = direct + (tokens - short) / (long - short) * (thinking - direct)
        out[1] = np.trapezoid(accuracy - line, tokens) / (long - short)
    return np.array(out)


# How sure


def resample(queries: Queries, points, resamples: int = 1000, seed: int = 0) -> Resamples:
    """The curve's `points` in resamples of the queries, with replacement within each topic: the
    topics are chosen, the queries a sample of what might be asked."""
    rng, steps = np.random.default_rng(seed), _Steps(queries.thresholds)
    topics = [np.flatnonzero(queries.topics == topic) for topic in np.unique(queries.topics)]
    levels = np.empty((resamples, 3, len(points)))
    ends, area = np.empty((resamples, 2, 2)), np.empty((resamples, 2))
    weights = np.empty(len(queries))
    for r in range(resamples):
        for places in topics:
            weights[places] = rng.multinomial(len(places), np.full(len(places), 1 / len(places)))
        weights *= queries.weights
        whole, ends[r] = steps.levels(queries, weights), queries.ends(weights)
        levels[r], area[r] = whole[:, points], areas(*whole, ends[r])
    return Resamples(*np.moveaxis(levels, 1, 0), ends, area)


def interval(samples: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Low and high quantile of resamples [R, ...]: [2, ...]."""
    return np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)


# Which bias


@dataclasses.dataclass(frozen=True)
class Target:
    """What a bias is chosen for:

    tokens      of the points with at most `value` mean tokens, the most accurate
    think_rate  the point whose think rate is nearest to `value`
    drop        of the points at most `value` less accurate than always thinking, the fewest tokens
    best        the most accurate point
    bias        the point that the bias `value` gives

    Of equals: the fewer tokens, then the more accurate, then the less thinking.
    """

    rule: str
    value: float = 0.0

    def __post_init__(self):
        if self.rule not in RULES or not math.isfinite(self.value):
            raise ValueError(f"a target is one of {', '.join(RULES)} and a finite number: {self}")
        if self.rule == "think_rate" and not 0 <= self.value <= 1:
            raise ValueError(f"a think rate is from 0 to 1, not {self.value:g}")
        if self.rule == "drop" and self.value < 0:
            raise ValueError(f"a drop is at least 0, not {self.value:g}")


def choose(curve: Curve, target: Target) -> int:
    """The point of a curve that meets a target.

    Raises:
      ValueError: no point does.
    """
    if target.rule == "bias":
        return curve.at(target.value)
    accuracy, tokens = curve.accuracy.round(12), curve.tokens.round(9)  # equal is equal
    allowed, first = np.full(len(tokens), True), -accuracy
    if target.rule == "think_rate":
        first = np.abs(curve.think_rate - target.value).round(12)
    elif target.rule == "tokens":
        allowed = tokens <= target.value
    elif target.rule == "drop":
        allowed, first = accuracy >= (curve.ends[1, 0] - target.value).round(12), tokens
    if not allowed.any():
        least = f"{tokens.min():.2f} tokens, the fewest there are"
        raise ValueError(f"no bias meets {target.rule} {target.value:g}: {least}")
    places = np.flatnonzero(allowed)
    ranked = np.lexsort((places, -accuracy[places], tokens[places], first[places]))
    return int(places[ranked[0]])


def held_out(queries: Queries, target: Target, folds: int = 10, seed: int = 0) -> np.ndarray | None:
    """Think rate, accuracy and tokens on queries that had no part in the choice: float64[3].

    Each tenth is answered at the bias chosen on the others. The point itself is chosen for its
    accuracy on the very queries it is then scored on, so its own figure is a little too good.
    None: too few queries.
    """
    if len(queries) < 2 * folds:
        return None
    rng, fold = np.random.default_rng(seed), np.empty(len(queries), int)
    for topic in np.unique(queries.topics):
        places = rng.permutation(np.flatnonzero(queries.topics == topic))
        fold[places] = (np.arange(len(places)) + rng.integers(folds)) % folds
    thinks = np.empty(len(queries), bool)
    for k in range(folds):
        chosen_on = curve(queries.take(fold != k))
        try:
            point = choose(chosen_on, target)
        except ValueError:
            point = int(np.argmin(chosen_on.tokens))
        bias = target.value if target.rule == "bias" else chosen_on.bias[point]
        thinks[fold == k] = queries.thresholds[fold == k] <= bias
    side = np.where(thinks, THINKING, BELOW)[:, None]
    values = [thinks] + [
        np.take_along_axis(v, side, 1)[:, 0] for v in (queries.scores, queries.tokens)
    ]
    return np.stack(values) @ queries.weights / queries.weights.sum()


# All of it

SHOWN = 400  # points of a curve that are kept for figures


def describe(queries: Queries, target: Target | None, resamples: int = 1000, seed: int = 0) -> dict:
    """A curve and what stands on it, ready for JSON; a number with its 95% interval is a triple.

    {"count", "certain", "auto_differs", "areas": {"same_think_rate", "same_tokens"},
     "non-thinking", "thinking", "unbiased", "chosen": {"think_rate", "accuracy", "tokens", ...},
     "curve": {"bias", "think_rate", "accuracy", "tokens", each a list}}
    """
    whole = curve(queries)
    last = len(whole.bias) - 1
    named = {"unbiased": whole.at(0.0)}
    if target is not None:
        named["chosen"] = choose(whole, target)
    shown = np.unique(np.linspace(0, last, min(SHOWN, last + 1)).round().astype(int))
    shown = np.union1d(shown, list(named.values()))
    sample = resample(queries, shown, resamples, seed)
    area = areas(whole.think_rate, whole.accuracy, whole.tokens, whole.ends)
    out = {
        "count": len(queries),
        "certain": float(queries.certain.mean()),
        "auto_differs": len(auto_differs(queries)),
        "areas": {
            name: _triple(area[i], sample.areas[:, i])
            for i, name in enumerate(("same_think_rate", "same_tokens"))
        },
    }
    for name, end in MODES.items():
        values = zip(("accuracy", "tokens"), whole.ends[end - 1], sample.ends[:, end - 1].T)
        out[name] = {key: _triple(value, samples) for key, value, samples in values}
    for name, point in named.items():
        out[name] = _point(whole, sample, point, int(np.searchsorted(shown, point)))
    if target is not None:
        if target.rule == "bias":
            out["chosen"]["bias"] = target.value
        apart = held_out(queries, target, seed=seed)
        names = ("think_rate", "accuracy", "tokens")
        out["chosen"]["held_out"] = None if apart is None else dict(zip(names, apart.tolist()))
    low, high = interval(sample.accuracy)
    columns = {n: getattr(whole, n)[shown] for n in ("bias", "think_rate", "accuracy", "tokens")}
    columns |= {"accuracy_low": low, "accuracy_high": high}
    return out | {"curve": {name: values.tolist() for name, values in columns.items()}}


def _point(whole: Curve, sample: Resamples, point: int, k: int) -> dict:
    """One point; `gain`: over random mixing at the same think rate, `drop`: below thinking."""
    values = {n: getattr(whole, n)[point] for n in ("think_rate", "accuracy", "tokens")}
    samples = {n: getattr(sample, n)[:, k] for n in values}
    chance = random_mixing(whole.ends, values["think_rate"])
    chances = random_mixing(sample.ends, samples["think_rate"][:, None])[..., 0]
    values["gain"] = values["accuracy"] - chance[0, 0]
    samples["gain"] = samples["accuracy"] - chances[0]
    values["drop"] = whole.ends[1, 0] - values["accuracy"]
    samples["drop"] = sample.ends[:, 1, 0] - samples["accuracy"]
    out = {name: _triple(values[name], samples[name]) for name in values}
    random = {"accuracy": float(chance[0, 0]), "tokens": float(chance[1, 0])}
    return out | {"bias": float(whole.bias[point]), "random": random}


def _triple(value, samples: np.ndarray) -> list[float] | None:
    """[value, low, high]; None where there is no such number."""
    if not np.isfinite(value):
        return None
    return [float(value), *(float(x) for x in interval(samples[np.isfinite(samples)]))]
