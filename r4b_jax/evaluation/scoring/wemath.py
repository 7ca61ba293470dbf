"""WeMath: problems of two or three steps, asked whole and step by step."""

from collections.abc import Sequence

from r4b_jax.evaluation.scoring import choice
from r4b_jax.evaluation.scoring.contract import Profile, Result, Row, Scorer, text
from r4b_jax.evaluation.scoring.report import Report, Scored, mean

PROBLEMS = 525  # in the whole benchmark; VLMEvalKit divides by it whatever is there
LETTERS = "ABCDEFGH"
# The concepts of each domain, as the tables of the benchmark's authors group them
DOMAINS = {
    "Understanding and Conversion of Units": (
        "Conversion Rates and Calculations Between Area Units",
        "Conversion Rates and Calculations Between Volume Units (Including Liters and Milliliters)",
        "Conversion Rates and Calculations Between Length Units",
    ),
    "Angles and Length": (
        "Understanding Angles (Using a Protractor)",
        "Understanding Length (Using a Ruler)",
    ),
    "Calculation of Plane Figures": (
        "Sum of Interior Angles of Other Polygons",
        "Sum of Interior Angles of Triangles",
        "Calculation and Comparison of Angles",
        "Area of Parallelograms",
        "Area of Triangles",
        "Area of Sectors",
        "Area of Trapezoids",
        "Area of Circles",
        "Area of Rectangles",
        "Area of Squares",
        "Perimeter of Parallelograms",
        "Perimeter of Triangles",
        "Perimeter of Trapezoids",
        "Circumference of Circles",
        "Perimeter of Rectangles",
        "Perimeter of Squares",
    ),
    "Understanding of Plane Figures": (
        "Properties and Understanding of Parallelograms",
        "Properties and Understanding of Triangles",
        "Properties and Understanding of Trapezoids",
        "Properties and Understanding of Rectangles",
        "Properties and Understanding of Squares",
        "Understanding Triangular Rulers",
        "Understanding and Representing Angles",
        "Distance Between Two Points",
        "Understanding Line Segments, Lines, and Rays",
        "perpendicularity",
        "Parallel",
        "Understanding Sectors",
        "Understanding Circles",
        "Observing Figures",
    ),
    "Calculation of Solid Figures": (
        "Surface Area of Cylinders",
        "Surface Area of Rectangular Cuboids",
        "Surface Area of Cubes",
        "Volume and Capacity of Cylinders",
        "Volume and Capacity of Cones",
        "Volume and Capacity of Rectangular Cuboids",
        "Volume and Capacity of Cubes",
    ),
    "Understanding of Solid Figures": (
        "Expanded View of Cylinders",
        "Expanded View of Rectangular Cuboids",
        "Expanded View of Cubes",
        "Properties of Cylinders",
        "Properties of Cones",
        "Properties and Understanding of Rectangular Cuboids",
        "Properties and Understanding of Cubes",
        "Observing Objects",
    ),
    "Basic Transformations of Figures": ("Axial Symmetry", "Translation", "Rotation"),
    "Cutting and Combining of Figures": (
        "Combining and Dividing Solids",
        "Division of Plane Figures",
        "Combining Plane Figures",
        "Tessellation of Figures",
        "Folding Problems of Figures",
    ),
    "Direction": (
        "Southeast, Southwest, Northeast, Northwest Directions",
        "Cardinal Directions (East, South, West, North)",
    ),
    "Position": ("Front-Back Position", "Up-Down Position", "Left-Right Position"),
    "Route Map": (
        "Determining the Positions of Objects Based on Direction, Angle, and Distance",
        "Describing Simple Routes Based on Direction and Distance",
    ),
    "Correspondence of Coordinates and Positions": (
        "Representing Positions Using Ordered Pairs",
        "Finding Positions Based on Ordered Pairs",
    ),
}


def score(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
    """With a judge as all multiple choice. Without, VLMEvalKit looks only at the letter that
    follows the last "Answer" (an empty prediction crashes it and is wrong here)."""
    if judge:
        return (yield from choice.score(row, prediction, profile, judge, "mcq_wemath"))
    after = prediction.split("Answer")[-1].strip()
    after = after.translate(str.maketrans("", "", "><:.")).strip()
    letter = after[0] if after and after[0] in LETTERS else None
    return Result(float(letter == row["answer"]), {"extracted": letter})


def score_cot(row: Row, prediction: str, profile: Profile, judge: bool) -> Scorer:
    """WeMath_COT: the same, but its judge has the wording of all multiple choice."""
    if judge:
        return (yield from choice.score(row, prediction, profile, judge))
    return (yield from score(row, prediction, profile, judge))


def wemath(rows: Sequence[Scored], profile: Profile) -> Report:
    """The four ways to solve or to fail a problem, as VLMEvalKit prints them: percent signs, two
    decimals, and of 525 problems, so that a subset's score is too high. The strict score is the
    headline, the main column of the benchmark's paper; the R-4B paper does not say which it took.
    """
    two, three = _problems(rows, 2), _problems(rows, 3)
    kinds = {"loose": {}, "strict": {}}
    for parts, whole in two + three:
        right, wrong = [x == 1 for x in parts], [x == 0 for x in parts]
        for mode, every, some in (("loose", any, all), ("strict", all, any)):
            # Mastered loosely: any step right. Memorised loosely: all steps wrong.
            for kind, holds in (
                ("InadequateGeneralization", all(right) and whole == 0),
                ("InsufficientKnowledge", any(wrong) and whole == 0),
                ("CompleteMastery", every(right) and whole == 1),
                ("RoteMemorization", some(wrong) and whole == 1),
            ):
                kinds[mode][kind] = kinds[mode].get(kind, 0) + holds
    line, scores = {"Model": None}, {}
    for mode in ("strict", "loose"):
        scores[mode] = _four_ways(line, mode.capitalize(), kinds[mode])
    line["One-step(S1)"] = _printed(mean(x for parts, _ in two + three for x in parts))
    line["Two-step(S2)"] = _printed(mean(whole for _, whole in two))
    line["Three-step(S3)"] = _printed(mean(whole for _, whole in three))
    line |= _domains(rows)
    return Report([line], scores["strict"] * 100, "Score (Strict)")


def _four_ways(line: dict, name: str, kinds: dict[str, int]) -> float:
    ways = ("InsufficientKnowledge", "InadequateGeneralization", "CompleteMastery")
    knows, general, master, rote = (kinds.get(k, 0) for k in (*ways, "RoteMemorization"))
    score = (PROBLEMS - 0.5 * general - rote - knows) / PROBLEMS
    line[f"Score ({name})"] = _printed(score)
    for way in ways:
        line[f"{way} ({name})"] = f"{_printed(kinds.get(way, 0) / PROBLEMS)} ({kinds.get(way, 0)})"
    solved = master + rote
    line[f"RoteMemorization ({name})"] = f"{_printed(rote / solved if solved else None)} ({rote})"
    return score


def _printed(value: float | None) -> str:
    return "nan%" if value is None else f"{value:.2%}"


def _problems(rows: Sequence[Scored], steps: int) -> list[tuple[list[float | None], float | None]]:
    """(scores of the steps, score of the whole) of each problem that has a first step; None where
    a row is missing or unjudged. What a problem has twice is combined each with each."""
    return [
        ([part and part.score for part in members[:-1]], members[-1] and members[-1].score)
        for members in _joined(rows, steps)
    ]


def _joined(rows: Sequence[Scored], steps: int) -> list[list[Scored | None]]:
    by_key: dict = {}
    for row in rows:
        by_key.setdefault((text(row["key"]), row["ID"]), []).append(row)
    found = [[row] for row in rows if row["key"] == f"{steps}steps_1"]
    for part in [*range(2, steps + 1), "multi"]:
        found = [
            [*members, more]
            for members in found
            for more in by_key.get((f"{steps}steps_{part}", members[0]["ID"]), [None])
        ]
    return found


def _domains(rows: Sequence[Scored]) -> dict[str, str]:
    """The mean of the concepts' means, of the steps of problems."""
    by_concept: dict = {}
    for steps in (2, 3):
        for members in _joined(rows, steps):
            for part in members[:-1]:
                if part is not None:
                    by_concept.setdefault(part["knowledge concept"], []).append(part.score)
    means = {concept: mean(found) for concept, found in by_concept.items()}
    return {
        domain: _printed(mean(means.get(concept) for concept in concepts))
        for domain, concepts in DOMAINS.items()
    }
