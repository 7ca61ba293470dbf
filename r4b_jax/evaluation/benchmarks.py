"""The paper's 25 benchmarks: where each one's table is, how it asks, how it is scored.

    benchmark = BENCHMARKS["mmstar"]
    table = benchmark.load("aug2025")
    for i, row in enumerate(table.rows):
        images = table.images(i)
        prompt = benchmark.prompt(row, len(images))      # [0, "Question: ..."]: see prompts.py
    ...
    results = judge.score_all(benchmark, table.rows, predictions, "aug2025")
    report = benchmark.report(table.rows, results, "aug2025")

Scores are VLMEvalKit's to the digit, in two profiles, its defects included; `DIFFERENCES` in
scoring/contract.py lists where it cannot be followed.
"""

import dataclasses
from collections.abc import Callable, Sequence

from r4b_jax.evaluation import prompts, tables
from r4b_jax.evaluation.scoring import (
    choice,
    graded,
    maths,
    olympiad,
    reading,
    wemath,
    yes_no,
)
from r4b_jax.evaluation.scoring.contract import (
    PROFILES,
    Ask,
    Profile,
    Result,
    Row,
    Scorer,
    replay,
)
from r4b_jax.evaluation.scoring.report import Report, Scored


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
      name: how r4b_jax calls it.
      title: its row in the paper's table; several benchmarks of one title are averaged.
      dataset: VLMEvalKit's name, and its table's: <dataset>.tsv.
      md5: of the table; a dict if the profiles have different ones.
      prompt: (row, number of images) -> pieces in message order, images as their places.
      scorer: (row, prediction, profile, judge?) -> what `contract.replay` runs.
      aggregate: (rows with results, profile) -> Report.
      judge: "no" (never asked), "rescue" (where rules find nothing; without a judge that is wrong),
        "needed" (rows that rules cannot decide are unjudged without one).
      files: other names the table may have.
      circular: rows come in groups, and a lost group needs no more questions to the judge.
    """

    name: str
    title: str
    dataset: str
    md5: str | dict[str, str]
    prompt: Callable[[Row, int], prompts.Prompt]
    scorer: Callable[[Row, str, Profile, bool], Scorer]
    aggregate: Callable[[Sequence[Scored], Profile], Report]
    judge: str = "rescue"
    files: tuple[str, ...] = ()
    circular: bool = False

    def load(
        self, profile: str = "head", root: str | None = None, any_file: bool = False
    ) -> tables.Table:
        """The table, from `root` or $LMUData or ~/LMUData; `any_file` takes one of any md5.

        Raises:
          ConfigError: it is missing or another file; the message names file and md5.
        """
        md5 = self.md5 if isinstance(self.md5, str) else self.md5[profile]
        return tables.read((self.dataset, *self.files), None if any_file else md5, root)

    def score(
        self,
        row: Row,
        prediction: str,
        replies: Sequence[str | None] | None = None,
        profile: str = "head",
    ) -> Result | Ask:
        """The result of one row, or the question its judge has to answer next.

        Args:
          prediction: as VLMEvalKit's evaluators see it: see `tables.split_think`, `read_back`.
          replies: of the judge, so far; None = there is no judge, then this is always a Result.
        """
        judged, known = replies is not None, list(replies or [])
        while True:
            scorer = self.scorer(row, prediction, PROFILES[profile], judged)
            result = replay(scorer, known)
            if judged or isinstance(result, Result):
                return result if judged else dataclasses.replace(result, asked=0)
            known.append(None)  # nobody is there to reply

    def report(
        self,
        rows: Sequence[Row],
        results: Sequence[Result],
        profile: str = "head",
        strict: bool = False,
    ) -> Report:
        """The benchmark's table and headline, over the rows in the order of the table's file.

        Args:
          strict: count unjudged rows as VLMEvalKit does, mostly as wrong, instead of leaving them
            out.
        """
        scored = [Scored(row, result) for row, result in zip(rows, results)]
        if strict:
            taken = [dataclasses.replace(result, score=result.strict) for result in results]
            scored = [Scored(row, result) for row, result in zip(rows, taken)]
        return dataclasses.replace(
            self.aggregate(scored, PROFILES[profile]),
            num_rows=len(rows),
            unjudged=sum(r.score is None and not r.details.get("skipped") for r in results),
            asked=sum(result.asked for result in results),
        )


_ALL = (
    Benchmark(
        name="mmmu_val",
        title="MMMU val",
        dataset="MMMU_DEV_VAL",
        md5="585e8ad75e73f75dcad265dfd0417d64",
        prompt=prompts.mmmu,
        scorer=choice.score_mmmu,
        aggregate=choice.validation,
    ),
    Benchmark(
        name="mmmu_pro_10c",
        title="MMMU-Pro",
        dataset="MMMU_Pro_10c",
        md5="22cee868fe6b680d14b99bfff6db8172",
        prompt=prompts.mmmu_pro,
        scorer=choice.score_mmmu,
        aggregate=choice.accuracy,
    ),
    Benchmark(
        name="mmmu_pro_v",
        title="MMMU-Pro",
        dataset="MMMU_Pro_V",
        md5="d01441a87b3dbe721b5a04652ae38009",
        prompt=prompts.mmmu_pro_vision,
        scorer=choice.score_mmmu_pro_vision,
        aggregate=choice.accuracy,
    ),
    Benchmark(
        name="mmstar",
        title="MMStar",
        dataset="MMStar",
        md5="e1ecd2140806c1b1bbf54b43372efb9e",
        prompt=prompts.choice,
        scorer=choice.score,
        aggregate=choice.accuracy,
    ),
    Benchmark(
        name="mmbench_v11_en",
        title="MMBench V1.1 EN dev",
        dataset="MMBench_DEV_EN_V11",
        md5="30c05be8f2f347a50be25aa067248184",
        prompt=prompts.choice,
        scorer=choice.score,
        aggregate=choice.circular,
        circular=True,
    ),
    Benchmark(
        name="mmbench_v11_cn",
        title="MMBench V1.1 CN dev",
        dataset="MMBench_DEV_CN_V11",
        md5="593f9b5f6bea453d870a798b34ae4f37",
        prompt=prompts.choice,
        scorer=choice.score,
        aggregate=choice.circular,
        circular=True,
    ),
    Benchmark(
        name="mmvet",
        title="MMVet",
        dataset="MMVet",
        md5="748aa6d4aa9d4de798306a63718455e3",
        prompt=prompts.question,
        scorer=graded.score_mmvet,
        aggregate=graded.mmvet,
        judge="needed",
    ),
    Benchmark(
        name="hallusionbench",
        title="HallusionBench",
        dataset="HallusionBench",
        md5="0c23ac0dc9ef46832d7a24504f2a0c7c",
        prompt=prompts.question,
        scorer=yes_no.score,
        aggregate=yes_no.hallusion,
    ),
    Benchmark(
        name="vlmblind",
        title="VLMs are Blind",
        dataset="VLMBlind",
        md5="e0f960236afe08f9fa48e8ccc908b2a9",
        prompt=prompts.choice,
        scorer=reading.score_vlmblind,
        aggregate=reading.vlmblind,
        judge="no",
    ),
    Benchmark(
        name="mmvp",
        title="MMVP",
        dataset="MMVP",
        md5="8cb732b141a0cba5b42159df2839e557",
        prompt=prompts.choice,
        scorer=choice.score,
        aggregate=choice.mmvp,
    ),
    Benchmark(
        name="visulogic",
        title="VisuLogic",
        dataset="VisuLogic",
        md5="b0820b5ec1e01dfe3951927f0def73b6",
        prompt=prompts.visulogic,
        scorer=reading.score_visulogic,
        aggregate=reading.visulogic,
        judge="no",
    ),
    Benchmark(
        name="realworldqa",
        title="RealWorldQA",
        dataset="RealWorldQA",
        md5="4de008f55dc4fd008ca9e15321dc44b7",
        prompt=prompts.choice,
        scorer=choice.score,
        aggregate=choice.accuracy,
    ),
    Benchmark(
        name="ai2d",
        title="AI2D",
        dataset="AI2D_TEST",
        md5="0f593e0d1c7df9a3d69bf1f947e71975",
        prompt=prompts.choice,
        scorer=choice.score,
        aggregate=choice.accuracy,
    ),
    Benchmark(
        name="charxiv_descriptive",
        title="CharXiv DQ",
        dataset="CharXiv_descriptive_val",
        md5={
            "aug2025": "e165037032f169a59dd09ea5d7ad3073",
            "head": "8507c3740f8ddaedcb6b5c1cfcb3fa06",
        },
        prompt=prompts.charxiv,
        scorer=graded.score_charxiv,
        aggregate=graded.charxiv_descriptive,
        judge="needed",
    ),
    Benchmark(
        name="charxiv_reasoning",
        title="CharXiv RQ",
        dataset="CharXiv_reasoning_val",
        md5={
            "aug2025": "98eeff269b40726982627b19338ccd45",
            "head": "6fc1a522ad32c2e3d72a89857b8cf10b",
        },
        prompt=prompts.charxiv,
        scorer=graded.score_charxiv,
        aggregate=graded.charxiv_reasoning,
        judge="needed",
    ),
    Benchmark(
        name="docvqa",
        title="DocVQA val",
        dataset="DocVQA_VAL",
        md5="d5ee77e1926ff10690d469c56b73eabf",
        prompt=prompts.short_answer,
        scorer=reading.score_docvqa,
        aggregate=reading.docvqa,
        judge="no",
    ),
    Benchmark(
        name="ocrbench",
        title="OCRBench",
        dataset="OCRBench",
        md5="e953d98a987cc6e26ef717b61260b778",
        prompt=prompts.question,
        scorer=reading.score_ocrbench,
        aggregate=reading.ocrbench,
        judge="no",
    ),
    Benchmark(
        name="blink",
        title="BLINK val",
        dataset="BLINK",
        md5={
            "aug2025": "3b6649b6a662184ea046908e5506260e",
            "head": "d5e8af148b10ac69f535ff7b23f3f989",
        },
        prompt=prompts.choice,
        scorer=choice.score_blink,
        aggregate=choice.accuracy,
    ),
    Benchmark(
        name="countbench",
        title="CountBench",
        dataset="CountBenchQA",
        md5="fc73c8d4ffa665431448753f094d56ff",
        prompt=prompts.count,
        scorer=reading.score_countbench,
        aggregate=reading.countbench,
        judge="no",
    ),
    Benchmark(
        name="mathvision",
        title="MathVision",
        dataset="MathVision",
        md5="93f6de14f7916e598aa1b7165589831e",
        prompt=prompts.question,
        scorer=maths.score_mathvision,
        aggregate=maths.mathvision,
        judge="needed",
    ),
    Benchmark(
        name="mathvista",
        title="MathVista mini",
        dataset="MathVista_MINI",
        md5="f199b98e178e5a2a20e7048f5dcb0464",
        prompt=prompts.question,
        scorer=maths.score_mathvista,
        aggregate=maths.mathvista,
        judge="needed",
    ),
    Benchmark(
        name="mathverse_vision_only",
        title="MathVerse vision",
        dataset="MathVerse_MINI_Vision_Only",
        md5="68a11d4680014ac881fa37adeadea3a4",
        prompt=prompts.question,
        scorer=maths.score_mathverse,
        aggregate=maths.mathverse,
        judge="needed",
        files=("MathVerse_MINIVOnly",),
    ),
    Benchmark(
        name="olympiadbench",
        title="OlympiadBench",
        dataset="OlympiadBench",
        md5="9735ae0f0299eae1e7d07f5a7feab914",
        prompt=prompts.olympiad,
        scorer=olympiad.score,
        aggregate=olympiad.olympiad,
        judge="no",
    ),
    Benchmark(
        name="wemath",
        title="WeMath",
        dataset="WeMath",
        md5="b5e969a075f01290a542411fb7766388",
        prompt=prompts.wemath,
        scorer=wemath.score,
        aggregate=wemath.wemath,
    ),
    Benchmark(
        name="logicvista",
        title="LogicVista",
        dataset="LogicVista",
        md5="41c5d33adf33765c399e0e6ae588c061",
        prompt=prompts.question,
        scorer=graded.score_logicvista,
        aggregate=graded.logicvista,
        judge="needed",
    ),
    Benchmark(
        name="dynamath",
        title="DynaMath",
        dataset="DynaMath",
        md5="b8425ad9a7114571fc9366e013699494",
        prompt=prompts.dynamath,
        scorer=maths.score_dynamath,
        aggregate=maths.dynamath,
        judge="needed",
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


def _variant(of: str, name: str, dataset: str, **changes) -> Benchmark:
    """The same table, asked or scored in another way; the paper's table has no row for it."""
    base = BENCHMARKS[of]
    changes = {"title": dataset, "files": (base.dataset, *base.files)} | changes
    return dataclasses.replace(base, name=name, dataset=dataset, **changes)


VARIANTS = (
    _variant(
        "mmmu_pro_10c",
        "mmmu_pro_10c_cot",
        "MMMU_Pro_10c_COT",
        prompt=prompts.mmmu_pro_cot,
        scorer=choice.score_mmmu_pro_cot,
    ),
    _variant(
        "mmmu_pro_v",
        "mmmu_pro_v_cot",
        "MMMU_Pro_V_COT",
        prompt=prompts.mmmu_pro_vision_cot,
        scorer=choice.score_mmmu_pro_cot,
    ),
    _variant(
        "mathverse_vision_only",
        "mathverse_vision_only_cot",
        "MathVerse_MINI_Vision_Only_cot",
        prompt=prompts.mathverse_cot,
    ),
    _variant(
        "wemath", "wemath_cot", "WeMath_COT", prompt=prompts.wemath_cot, scorer=wemath.score_cot
    ),
    _variant("dynamath", "dynamath_noprompt", "DynaMath_noprompt", prompt=prompts.dynamath_bare),
)
BENCHMARKS |= {variant.name: variant for variant in VARIANTS}
# The rows of the paper's table, in its order, and the benchmarks whose headlines they average.
PAPER_ROWS: dict[str, tuple[str, ...]] = {}
for _benchmark in _ALL:
    PAPER_ROWS[_benchmark.title] = (*PAPER_ROWS.get(_benchmark.title, ()), _benchmark.name)


def paper_numbers(reports: dict[str, Report]) -> dict[str, float | None]:
    """{row of the paper's table: number} from the reports by benchmark; a row is missing as long as
    one of its benchmarks is, and None if one of them has no number."""
    found = {}
    for title, names in PAPER_ROWS.items():
        if all(name in reports for name in names):
            numbers = [reports[name].headline for name in names]
            found[title] = None if None in numbers else sum(numbers) / len(numbers)
    return found
