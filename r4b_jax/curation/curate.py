"""Who thinks, decided without labels (PAPER.md section 4).

Queries are decided block by block, in order:

    1  unreadable, without an answer, or nearly an earlier one       -> set aside
    2  its topic has a reward: the teacher answers N times at once
           one is right                                              -> direct
           all are wrong                                             -> needs a thought
       other topics: a judge is asked whether answering takes reasoning
    3  a thought is looked for: the record's own, then the reasoner's, until one passes the
       filters and leads to the reference answer
           found                                                     -> reasoning
           not found                                                 -> set aside

The answer that is kept is always the record's. Nothing is guessed: an answer that could not be had
is not a wrong one, and whatever fails sets its query aside with the reason. Every query has its
line in decisions.jsonl; those decided are in samples.jsonl, a source like any other.

What an endpoint answered is kept. So a server that failed for a while costs nothing but its
queries: without journal.jsonl and report.json, the same command decides all of them again and asks
only for what is missing.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import math
import os

import grain

from r4b_jax.common import processes
from r4b_jax.common.endpoint import Answer
from r4b_jax.common.metrics import Progress, warn
from r4b_jax.config import Config
from r4b_jax.curation import prompts, report
from r4b_jax.curation.answers import CUT_OFF, Ask, People, people, told
from r4b_jax.curation.filters import Near, refusal
from r4b_jax.curation.output import Output
from r4b_jax.data import images
from r4b_jax.data.mixture import queries
from r4b_jax.data.records import to_record
from r4b_jax.data.samples import RecordError, Sample, SetAside, Turn
from r4b_jax.data.tokenizer import Tokenizer
from r4b_jax.evaluation.report import read as read_report
from r4b_jax.rl.reward_pool import RewardPool, canary
from r4b_jax.rl.rewards import Answered

DIRECT, REASONING, SET_ASIDE = report.DECISIONS
# Causes of a query that never was among those a later one may be too like.
UNSEEN = ("unreadable", "no answer", "duplicate")


def curate(config: Config, params: dict | None, tokenizer: Tokenizer | None, workdir: str) -> dict:
    """Decide `config.curation`'s queries, or what is left of them, into `workdir`/curation.

    Args:
      params, tokenizer: the own model, for teacher, judge or reasoner without a url; None = they
        are absent, and queries that need them are set aside.
    Returns:
      the content of report.json.
    Raises:
      ConfigError: the sources or an endpoint cannot be used.
    """
    folder, curation = os.path.join(workdir, "curation"), config.curation
    if (content := read_report(folder)) is None:
        wanted, args = (
            curation.num_queries,
            (curation.sources, curation.topics, "curation", workdir),
        )
        stream, bad = queries(config, *args, number=wanted)
        if wanted > len(stream):
            warn(
                f"curation: {wanted} queries are wanted, and a topic is through after {len(stream)}"
            )
        if wanted:
            stream = stream[: min(wanted, len(stream))]
        if bad:  # they too end with a reason
            stream = grain.MapDataset.concatenate([grain.MapDataset.source(bad), stream])
        cache = os.path.join(folder, "answers")
        with people(config, params, tokenizer, cache) as asked:
            content = decide(config, stream, asked, folder)
    report.show(content, folder)
    return content


def decide(config: Config, stream, asked: People, folder: str) -> dict:
    """Decide the queries of `stream`, and write the report.

    Args:
      stream: its item i is query i, a Sample or a SetAside.
    """
    with processes.first_goes_first("curation"):
        output = Output(folder)
    total, size = len(stream), config.generate.batch_size
    graded = config.curation.rewards if processes.is_first() else {}  # the others are told
    pool = RewardPool(graded, config.bpo.reward_workers, config.bpo.reward_deadline)
    progress = Progress("curation", total, output.queries)
    with pool, concurrent.futures.ThreadPoolExecutor(config.workers) as readers, progress:
        canary(pool)
        curator = Curator(config, asked, pool)
        curator.recall(output)
        before = output.counters
        while output.queries < total:
            numbers = range(output.queries, min(output.queries + size, total))
            cases = list(readers.map(lambda number: read(number, stream[number]), numbers))
            curator.decide(cases)
            samples = [c.sample for c in cases if c.decision != SET_ASIDE]
            counters = _sums(before, {role: who.counters for role, who in asked.present.items()})
            output.append([case.as_json() for case in cases], samples, counters)
            progress.advance(len(cases), **curator.shares())
    with processes.first_goes_first("the report of curation"):
        if processes.is_first():
            names = {role: who.name for role, who in asked.present.items()}
            report.write(config, output, names)
    return read_report(folder)


def _sums(before: dict, counters: dict) -> dict:
    """Counters of this process on top of those of earlier ones."""
    return {
        role: {name: count + before.get(role, {}).get(name, 0) for name, count in counts.items()}
        for role, counts in counters.items()
    }


@dataclasses.dataclass
class Case:
    """A query on its way to a decision."""

    number: int
    id: str
    topic: str = ""
    sample: Sample | None = None  # None = it cannot be read; once decided, as it is written
    context: str = ""  # a hash of its pictures, system prompt and earlier turns
    decision: str = ""  # "" = open
    cause: str = ""  # of the decision: a short name, which the report counts
    reason: str = ""
    needs: tuple[str, str] = ("", "")  # cause and reason why it needs a thought
    right: int | None = None  # of `tries` graded answers of the teacher
    tries: int | None = None
    who: str = ""  # whose thought was kept: "record" or "reasoner"
    refused: list[dict] = dataclasses.field(default_factory=list)  # thoughts, and by what

    def end(self, decision: str, cause: str, reason: str):
        self.decision, self.cause, self.reason = decision, cause, reason
        if decision == DIRECT:
            self.sample = self.sample.answered(self.sample.answer, None)

    def refuse(self, who: str, by: str, detail: str):
        """A thought of `who` cannot be kept."""
        self.refused.append({"who": who, "filter": by, "detail": detail[:500]})

    def as_json(self) -> dict:
        names = ("id", "topic", "decision", "cause", "reason", "right", "tries", "who", "refused")
        question = self.sample.question if self.sample else ""
        values = {name: getattr(self, name) for name in names}
        return values | {"question": question, "context": self.context}


def read(number: int, record: Sample | SetAside) -> Case:
    """Open a query, its pictures read; set aside if it cannot be used."""
    case = Case(number, record.id)
    if isinstance(record, SetAside):
        case.end(SET_ASIDE, "unreadable", record.reason)
        return case
    case.topic = record.topic
    try:
        if not record.answer.strip():
            case.end(SET_ASIDE, "no answer", "the record has no answer to keep")
            return case
        for image in record.images:
            images.read(image)
        case.context = _context(record)
        case.sample = record
    except RecordError as error:
        case.end(SET_ASIDE, "unreadable", str(error))
    return case


def _context(sample: Sample) -> str:
    """A hash of all that a model sees beside the last question."""
    *earlier, _ = sample.turns
    seen = [sample.system, *(text for t in earlier for text in (t.question, t.answer))]
    out = hashlib.sha1("\0".join(seen).encode(errors="replace"))
    for message in to_record(sample)["messages"]:
        if message["role"] == "user":
            shown = [part["image"] for part in message["content"] if part["type"] == "image"]
            out.update(b"".join(hashlib.sha1(data).digest() for data in shown))
    return out.hexdigest()


class Curator:
    """Decides queries, and remembers what later ones must not repeat."""

    def __init__(self, config: Config, asked: People, pool: RewardPool):
        self.curation, self.asked, self.pool = config.curation, asked, pool
        self.seen = Near(self.curation.duplicate_similarity)  # questions
        self.thoughts = Near(self.curation.duplicate_similarity)
        self.counts = dict.fromkeys(report.DECISIONS, 0)

    def recall(self, output: Output):
        """What was decided before this process began."""
        for decision, record in output.read():
            self.counts[decision["decision"]] += 1
            if decision["cause"] not in UNSEEN:
                self.seen.add(decision["context"], decision["question"], decision["id"])
            if decision["decision"] == REASONING:
                thought = record["messages"][-1]["reasoning_content"]
                self.thoughts.add(decision["context"], thought, decision["id"])

    def shares(self) -> dict[str, float]:
        """Of the queries so far, for the progress bar."""
        total = sum(self.counts.values())
        return {name.replace(" ", "_"): count / total for name, count in self.counts.items()}

    def decide(self, cases: list[Case]):
        """Bring a block's open cases to their decisions."""
        for case in _open(cases):
            if twin := self.seen.add(case.context, case.sample.question, case.id):
                case.end(SET_ASIDE, "duplicate", f"nearly the same question as {twin}")
        objective = [case for case in _open(cases) if case.topic in self.curation.rewards]
        subjective = [case for case in _open(cases) if case.topic not in self.curation.rewards]
        self.answer(objective)
        self.judge(subjective)
        self.find_thoughts(_open(cases))
        for case in cases:
            self.counts[case.decision] += 1

    def answer(self, cases: list[Case]):
        """Objective queries: does the teacher get any of N answers right?"""
        count, teacher = self.curation.num_answers, self.asked.teacher
        if teacher is None:
            for case in cases:
                case.end(SET_ASIDE, "no teacher", "it has a reward, and there is no teacher")
            return
        answers = teacher.ask([self._ask(case) for case in cases], count)
        asked = [case for case in cases for _ in range(count)]
        graded = iter(self.grade(asked, [answer for of_case in answers for answer in of_case]))
        for case in cases:
            verdicts = [next(graded) for _ in range(count)]
            faults = [fault for right, fault in verdicts if right is None]
            case.right = sum(right is True for right, _ in verdicts)
            case.tries = count - len(faults)
            if case.right:
                case.end(DIRECT, "right", f"{case.right} of {case.tries} answers right")
            elif faults:
                why = f"teacher: {len(faults)} of {count} answers missing ({_commonest(faults)})"
                case.end(SET_ASIDE, "answers missing", why)
            elif all(fault == CUT_OFF for _, fault in verdicts):
                why = f"teacher: all {count} answers cut off: it may write too little"
                case.end(SET_ASIDE, "answers cut off", why)
            else:
                case.needs = "all wrong", f"all {count} answers wrong"

    def judge(self, cases: list[Case]):
        """Subjective queries: does answering take reasoning?"""
        shown = []
        for case in cases:
            question = prompts.NEEDS_THOUGHT.format(question=case.sample.last.question)
            last = dataclasses.replace(case.sample.last, question=question)
            shown.append(dataclasses.replace(case.sample, turns=(*case.sample.turns[:-1], last)))
        replies = self._judged([Ask(sample, case.number) for case, sample in zip(cases, shown)])
        for case, reply in zip(cases, replies):
            if self.asked.judge is None:
                case.end(SET_ASIDE, "no judge", "it has no reward, and there is no judge")
            elif reply.text is None:
                case.end(SET_ASIDE, "judge failed", f"judge: no verdict ({reply.fault})")
            elif (thinks := prompts.needs_thought(reply.text)) is None:
                told = f"judge: no decision in its last line: {_end_of(reply.text)!r}"
                case.end(SET_ASIDE, "judge unclear", told)
            elif thinks:
                case.needs = "judge", "the judge wants reasoning"
            else:
                case.end(DIRECT, "judge", "the judge wants no reasoning")

    def find_thoughts(self, cases: list[Case]):
        """Look for a thought for each: the record's own, else one of the reasoner's."""
        for case in cases:
            if (thought := case.sample.last.thought) is not None:
                self.offer(case, thought, "record", refusal(self.curation, thought))
        rounds = self.curation.num_traces if self.asked.reasoner else 0
        for number in range(rounds):
            if not (waiting := _open(cases)):
                break
            asks = [self._ask(case) for case in waiting]
            traces = [trace for (trace,) in self.asked.reasoner.ask(asks, first=number)]
            faults = self.inconsistent(waiting, traces, number)
            for case, trace, fault in zip(waiting, traces, faults):
                self.offer(case, trace.thought, "reasoner", fault)
        for case in _open(cases):
            _, needs = case.needs
            refused = collections.Counter(f"{r['who']} {r['filter']}" for r in case.refused)
            told = ", ".join(f"{count} x {by}" for by, count in refused.items())
            if not told:
                case.end(SET_ASIDE, "no reasoner", f"{needs}; no thought, and no reasoner")
                continue
            detail = next((r["detail"] for r in reversed(case.refused) if r["detail"]), "")
            told += f", the last: {detail}" if detail else ""
            case.end(SET_ASIDE, "no thought passed", f"{needs}; no thought passed: {told}")

    def offer(self, case: Case, thought: str, who: str, fault: tuple[str, str] | None):
        """Keep a thought that has no fault so far, unless it is one that was kept before: then it
        is not about this question."""
        if fault is None and (twin := self.thoughts.add(case.context, thought, case.id)):
            fault = "near duplicate", f"of the thought of {twin}"
        if fault is not None:
            case.refuse(who, *fault)
            return
        case.who, case.sample = who, case.sample.answered(case.sample.answer, thought)
        cause, reason = case.needs
        case.end(REASONING, cause, f"{reason}; thought of the {who}")

    def inconsistent(
        self, cases: list[Case], traces: list[Answer], number: int
    ) -> list[tuple[str, str] | None]:
        """Why a trace cannot be kept, or None: there is none, a filter refuses it, or its answer is
        not the reference."""
        faults: list[tuple[str, str] | None] = []
        for trace in traces:
            if trace.text is None:
                cut = trace.fault.startswith("cut off")
                faults.append(("cut off" if cut else "no reply", trace.fault))
            else:
                faults.append(refusal(self.curation, trace.thought))
        left = [i for i, fault in enumerate(faults) if fault is None]
        objective = [i for i in left if cases[i].topic in self.curation.rewards]
        graded = self.grade([cases[i] for i in objective], [traces[i] for i in objective])
        for i, (right, fault) in zip(objective, graded):
            if right is None:
                faults[i] = "not graded", fault
            elif not right:
                faults[i] = "another answer", _end_of(traces[i].text)
        subjective = [i for i in left if cases[i].topic not in self.curation.rewards]
        asks = [_compared(cases[i], traces[i]) for i in subjective]
        for i, reply in zip(subjective, self._judged(asks, 1 + number)):
            agree = None if reply.text is None else prompts.agrees(reply.text)
            if agree is None:
                faults[i] = "not compared", reply.fault or _end_of(reply.text)
            elif not agree:
                faults[i] = "another answer", _end_of(traces[i].text)
        return faults

    def grade(self, cases: list[Case], answers: list[Answer]) -> list[tuple[bool | None, str]]:
        """Whether each answer is right, None = nobody can tell, and then why not. One that was cut
        off is wrong, as everywhere here."""
        items, places = [], []
        cut = [answer.fault.startswith(CUT_OFF) for answer in answers]  # maybe "after 2 tries"
        out = [(False, CUT_OFF) if c else (None, a.fault) for c, a in zip(cut, answers)]
        for i, (case, answer) in enumerate(zip(cases, answers)):
            if answer.text is not None:
                question, reference = case.sample.question, case.sample.answer
                items.append(Answered(case.topic, question, reference, answer.text, answer.thought))
                places.append(i)
        # The pool of the first process alone has rewards.
        rewards, faults = self.pool.submit(items).result()
        why = {fault.index: f"{fault.kind}: {fault.message}" for fault in faults}
        graded = [
            (None, f"not graded, {why.get(n, 'its reward is none')}")
            if math.isnan(reward)
            else (bool(reward >= self.curation.right_from), "")
            for n, reward in enumerate(rewards)
        ]
        for i, verdict in zip(places, told(graded)):
            out[i] = tuple(verdict)
        return out

    def _ask(self, case: Case) -> Ask:
        return Ask(case.sample, case.number, self.curation.rewards.get(case.topic, ""))

    def _judged(self, asks: list[Ask], number: int = 0) -> list[Answer]:
        """What the judge says to each."""
        if self.asked.judge is None or not asks:
            return [Answer(None, fault="there is no judge")] * len(asks)
        return [reply for (reply,) in self.asked.judge.ask(asks, first=number)]


def _open(cases: list[Case]) -> list[Case]:
    return [case for case in cases if not case.decision]


def _compared(case: Case, trace: Answer) -> Ask:
    """What the judge is shown to compare a trace's answer with the reference: no pictures."""
    sample = case.sample
    question = prompts.SAME_ANSWER.format(
        question=sample.question, reference=sample.answer, answer=trace.text
    )
    return Ask(Sample(case.topic, (Turn(question, answer=sample.answer),), case.id), case.number)


def _commonest(faults: list[str]) -> str:
    return collections.Counter(faults).most_common(1)[0][0]


def _end_of(text: str) -> str:
    return text.strip()[-100:]
