"""The prompt of each benchmark, as VLMEvalKit builds it.

A prompt is a list of pieces in message order: an int is the place of one of the row's images, a str
is text. The wording is a part of the benchmarks, so it is VLMEvalKit's (Apache-2.0) to the letter.
"""

from r4b_jax.evaluation.scoring import options
from r4b_jax.evaluation.scoring.contract import Row, text

Piece = int | str
Prompt = list[Piece]


def question(row: Row, num_images: int) -> Prompt:
    """All images, then the question as it stands."""
    return [*range(num_images), text(row["question"])]


def short_answer(row: Row, num_images: int) -> Prompt:
    """DocVQA."""
    asked = text(row["question"])
    return [*range(num_images), f"{asked}\nAnswer the question using a single word or phrase."]


def count(row: Row, num_images: int) -> Prompt:
    """CountBench."""
    rule = "Note that: answer with a number directly e.g. 3. Do not include any additional text."
    return [*range(num_images), f"{text(row['question'])} {rule}"]


def charxiv(row: Row, num_images: int) -> Prompt:
    """The first image alone."""
    return [*range(min(num_images, 1)), text(row["question"])]


def mathverse_cot(row: Row, num_images: int) -> Prompt:
    return [*range(num_images), text(row["query_cot"])]


# Multiple choice


def _listed(row: Row, hint: bool = True) -> str:
    lines = []
    if hint and row.get("hint") is not None:
        lines.append(f"Hint: {row['hint']}\n")
    lines.append(f"Question: {text(row['question'])}\n")
    if choices := options.of_row(row):
        lines.append("Options:\n")
        lines += [f"{letter}. {option}\n" for letter, option in choices.items()]
    return "".join(lines)


def choice(row: Row, num_images: int) -> Prompt:
    """All images, then hint, question and options."""
    closing = "Please select the correct answer from the options above. \n"
    closing = closing if options.of_row(row) else ""
    return [*range(num_images), _listed(row) + closing]


def mmmu(row: Row, num_images: int) -> Prompt:
    """The same, but images stand where the text has `<image 1>`."""
    return _interleaved(choice(row, num_images))


def _interleaved(prompt: Prompt) -> Prompt:
    """Images put in place of their tags, which have one digit; what is no such tag stays text.
    (VLMEvalKit stops at one; it takes `<image 0>` for the last image.)"""
    *images, whole = prompt
    first, *rest = whole.split("<image ")
    pieces, placed = [first], False
    for part in rest:
        place = int(part[0]) - 1 if part[:1] in tuple("0123456789") and part[1:2] == ">" else None
        if place is None or place >= len(images) or not images:
            pieces[-1] += f"<image {part}"
            continue
        pieces += [images[place], part[2:]]
        placed = True
    return pieces if placed else prompt


_DIRECT = "Answer directly with the option letter from the given choices. "
_LAST_LINE = (
    "The last line of your response should be of the following format: 'Answer: $LETTER' (without "
    "quotes) where LETTER is one of the options. Think step by step before answering. "
)


def mmmu_pro(row: Row, num_images: int) -> Prompt:
    return _mmmu_pro(row, num_images, _DIRECT)


def mmmu_pro_cot(row: Row, num_images: int) -> Prompt:
    asked = "Answer the following multiple-choice question. " + _LAST_LINE
    return _mmmu_pro(row, num_images, asked)


def _mmmu_pro(row: Row, num_images: int, closing: str) -> Prompt:
    closing = closing if options.of_row(row) else ""
    return _interleaved([*range(num_images), _listed(row, hint=False) + closing])


_IN_IMAGE = "Answer the following multiple-choice question in the image. "


def mmmu_pro_vision(row: Row, num_images: int) -> Prompt:
    return [*range(min(num_images, 1)), _IN_IMAGE + _DIRECT]


def mmmu_pro_vision_cot(row: Row, num_images: int) -> Prompt:
    return [*range(min(num_images, 1)), _IN_IMAGE + _LAST_LINE]


def wemath(row: Row, num_images: int) -> Prompt:
    return [*range(num_images), _listed(row)]


def wemath_cot(row: Row, num_images: int) -> Prompt:
    return [*range(num_images), f"{_listed(row)}\n{text(row['requirement'])}"]


def visulogic(row: Row, num_images: int) -> Prompt:
    rule = (
        "\nSolve the complex visual logical reasoning problem through step-by-step reasoning."
        "Think about the reasoning process first and answer the question following this format: "
        "Answer: \\boxed{$LETTER}"
    )
    return [*range(num_images), text(row["question"]) + rule]


# DynaMath

_GUIDE = """
## Answer Instruction Please provide an answer to the question outlined above. Your response \
should adhere to the following JSON format, which includes two keys: 'solution' and 'short \
answer'. The 'solution' key can contain detailed steps needed to solve the question, and the \
'short answer' key should provide a concise response. {rule}

Example of expected JSON response format:

{{
    "solution": "[Detailed step-by-step explanation]",
    "short answer": "[Concise Answer]"
}}"""
_RULES = {  # "corresponing": the benchmark's spelling
    "multiple choice": "Provide the corresponing choice option in the 'short answer' key, such as "
    "'A', 'B', 'C', or 'D'.",
    "float": "Format the answer as a three-digit floating-point number and provide it in the "
    "'short answer' key.",
}
_OTHER_RULE = (
    "Float numbers in the answer should be formatted as three-digit floating-point numbers."
)


def dynamath(row: Row, num_images: int) -> Prompt:
    *images, asked = dynamath_bare(row, num_images)
    return [*images, asked + _GUIDE.format(rule=_RULES.get(row["answer_type"], _OTHER_RULE))]


def dynamath_bare(row: Row, num_images: int) -> Prompt:
    return [*range(num_images), f"## Question\n {text(row['question'])}"]


# OlympiadBench

_KINDS = {
    "Numerical": ("a numerical value", "数值"),
    "Expression": ("an expression", "表达式"),
    "Equation": ("an equation", "方程"),
    "Interval": ("an interval", "区间"),
}


def olympiad(row: Row, num_images: int) -> Prompt:
    """The text first, then the images. The unit is always mentioned: VLMEvalKit takes a missing
    one for true."""
    source, maths = text(row["source"]), "maths" in text(row["source"])
    if "zh" in source:
        instruction = _olympiad_chinese(row, maths, "TP" in source)
    else:
        instruction = _olympiad_english(row, maths, "TP" in source)
    context = "" if maths or row.get("context") is None else f"{row['context']}\n"
    return [f"{instruction}\n{context}{text(row['question'])}", *range(num_images)]


def _olympiad_english(row: Row, maths: bool, proof: bool) -> str:
    subject = "Math" if maths else "Physics"
    if proof:
        return (
            f"The following is a theorem proving problem from an International {subject} "
            "competition. Please use logical reasoning and common theorems to prove the "
            "proposition in the problem according to the given requirements. Please use LaTeX "
            "format to represent the variables and formulas used in the proof."
        )
    several = row["is_multiple_answer"]
    boxed = "multiple answers connected with commas" if several else "answer"
    return (
        f"The following is an open-ended problem from an International {subject} competition. "
        f"{_answer_type(row, chinese=False)}Please calculate the answer according to the given "
        "requirements and the information provided. Please use LaTeX format to represent the "
        "variables and formulas used in the solution process and results. Please end your "
        f'solution with "So the final answer is \\boxed{{{boxed}}}(unit)." and give the result '
        "explicitly, note that the unit of the answer should not be included in \\boxed{}."
    )


def _olympiad_chinese(row: Row, maths: bool, proof: bool) -> str:
    subject = "数学" if maths else "物理"
    if proof:
        return (
            f"以下是中国{subject}竞赛中的证明题。请根据题目的要求，运用逻辑推理及常用定理证明"
            "题目中的命题。证明过程中使用的变量和公式请使用LaTeX格式表示。"
        )
    boxed = "用英文逗号连接的多个答案" if row["is_multiple_answer"] else "答案"
    return (
        f"以下是中国{subject}竞赛中的解答题{_answer_type(row, chinese=True)}。请根据题目的要求和"
        "所提供的信息计算得出答案。解答过程和结果中使用的变量和公式请使用LaTeX格式表示。"
        f'请在最后以"所以最终答案是\\boxed{{{boxed}}}(单位)。"显式给出结果，'
        "注意答案的单位不要放在\\boxed{}中。"
    )


def _answer_type(row: Row, chinese: bool) -> str:
    """The sentence about the kind of answer; none for proofs, tuples and kinds not known (at which
    VLMEvalKit stops)."""
    cell = text(row["answer_type"])
    if "Need_human_evaluate" in cell or "Tuple" in cell:
        return ""
    parts = cell.split(",") if row["is_multiple_answer"] else [cell]
    kinds = [_kind(part, chinese) for part in parts]
    if None in kinds:
        return ""
    if not row["is_multiple_answer"]:
        whole = "，答案类型为{}" if chinese else "The answer of The problem should be {}. "
    elif len(set(kinds)) == 1:
        kinds = kinds[:1]
        whole = (
            "，题目有多个答案，答案类型均为{}"
            if chinese
            else "The problem has multiple answers, each of them should be {}. "
        )
    else:
        whole = (
            "，题目有多个答案，答案类型分别为{}"
            if chinese
            else "The problem has multiple answers, with the answers in order being {}. "
        )
    return whole.format(("、" if chinese else ", ").join(kinds))


def _kind(cell: str, chinese: bool) -> str | None:
    named = cell.split("-")[0] if "-" in cell else cell
    return next((words[chinese] for kind, words in _KINDS.items() if kind in named), None)
