"""What judges are asked: our own wording, or VLMEvalKit's from a checkout of it.

Both ask for replies of the same form, but a judge may answer them differently: numbers with a judge
compare with published ones only in VLMEvalKit's wording, so reports say which it was.
"""

import ast
import dataclasses
import os
import re
from collections.abc import Callable

from r4b_jax.config import ConfigError
from r4b_jax.evaluation.scoring.contract import Ask

OWN = "r4b_jax's own wording"


@dataclasses.dataclass(frozen=True)
class Wording:
    source: str  # for the report
    templates: dict[str, Callable[[dict[str, str]], str]]  # Ask.kind -> slots -> text
    system: dict[str, str] = dataclasses.field(default_factory=dict)  # Ask.kind -> system prompt

    def text(self, ask: Ask) -> str:
        if ask.kind == "charxiv":  # the table has the whole prompt
            return ask.slots["prompt"]
        return self.templates[ask.kind](ask.slots)


# Our own

_CHOOSE = """\
Below are a multiple-choice question, its options and a reply to it. Which option did the reply \
choose? {extra}Write the option's capital letter and nothing else; write Z if the reply refuses, \
chooses none, or means something that is not among the options. Do not solve the question yourself.

Question: {question}
Options: {options}
Reply: {prediction}

Letter:"""
_CHOOSE_CHINESE = """\
下面有一道单选题、它的选项和一个回答。这个回答选择了哪个选项？只写出该选项的大写字母，不要写别的内容；\
如果回答拒绝作答、没有选择，或者与所有选项的意思都不同，就写 Z。不要自己解题。

题目：{question}
选项：{options}
回答：{prediction}

字母："""
_EXTRACT = """\
Below are a question and a reply to it. Write the reply's final answer in the form that the \
question asks for, such as 14, 0.6, [2007, 2008] or B, and nothing else. Do not solve the question \
yourself.

Question: {question}
Reply: {prediction}

Final answer:"""
_SHORTEN = """\
Below is a free-form answer. {rule}

Answer: {prediction}

Short answer:"""
_OWN = {
    "mcq": _CHOOSE.replace("{extra}", ""),
    "mcq_blink": _CHOOSE.replace("{extra}", "It may stand in brackets. "),
    "mcq_wemath": _CHOOSE.replace("{extra}", "There are options up to G. "),
    "mcq_chinese": _CHOOSE_CHINESE,
    "yes_no": """\
Below are a yes-or-no question and a reply to it. Does the reply say yes or no? Write one word: \
Yes, No, or Unknown if it says neither. Do not answer the question yourself.

Question: {question}
Reply: {prediction}

Word:""",
    "mathvista": _EXTRACT,
    "mathvision": _EXTRACT,
    "mathverse_extract": """\
Below is a reply to a mathematics question. Write its final answer and nothing else, as it stands \
there; write null if it gives none.

Reply: {prediction}

Final answer:""",
    "mathverse_score": """\
Below are a mathematics question, its right answer and another answer. Write 1 if the two answers \
mean exactly the same, else 0, and nothing else. Of multiple choice, the letters must be the same; \
other answers may be written in another way, such as 0.5 m and 50 cm.

Question: {question}
Right answer: {answer}
Other answer: {extract}

1 or 0:""",
    "logicvista": """\
Below are a question and a reply to it that chooses one or several of its options. Write the \
capital letters of the options it chose, without anything between them, and nothing else; write Z \
if it chose none. Do not solve the question yourself.

Question: {question}
Reply: {prediction}

Letters:""",
    "mmvet": """\
Grade a reply against the right answer, from 0.0 (all wrong) over 0.1, 0.2 ... to 1.0 (all right). \
Where the right answer has <AND>, all its parts must be in the reply, and some of them earn a part \
of the grade; where it has <OR>, any one of them earns all. Write the grade as a bare number and \
nothing else.

Question: {question}
Right answer: {answer}
Reply: {prediction}

Grade:""",
    "dynamath_choice": _SHORTEN.replace(
        "{rule}", "Write the letter of the option it chooses, such as A, B, C or D, in one line."
    ),
    "dynamath_float": _SHORTEN.replace(
        "{rule}", "Write its number with three decimals, in one line and with nothing else."
    ),
    "dynamath_text": _SHORTEN.replace(
        "{rule}", "Write it as a short answer in one line, numbers with three decimals."
    ),
}


def own() -> Wording:
    """Ours."""
    return Wording(OWN, {kind: _filled(template) for kind, template in _OWN.items()})


def _filled(template: str) -> Callable[[dict[str, str]], str]:
    return lambda slots: template.format(**slots)


# VLMEvalKit's

_CHOICES = "utils/multiple_choice.py"
_BUILDERS = {  # kind -> (file, function); the first four take question, options and prediction
    "mcq": (_CHOICES, "build_prompt"),
    "mcq_chinese": (_CHOICES, "build_prompt_cn"),
    "mcq_blink": (_CHOICES, "build_prompt_blink"),
    "mcq_wemath": (_CHOICES, "build_prompt_wemath"),
    "yes_no": ("utils/yorn.py", "YOrN_match_prompt"),
    "mathvista": ("utils/mathvista.py", "build_mathvista_gpt4_prompt"),
    "mathvision": ("utils/mathv.py", "build_mathv_gpt4_prompt"),
    "mathverse_extract": ("utils/mathverse.py", "build_mathverse_gpt4_extract_prompt"),
    "mathverse_score": ("utils/mathverse.py", "build_mathverse_gpt4_score_prompt"),
    "logicvista": ("utils/logicvista.py", "build_prompt_logicvista"),
    "mmvet": ("utils/mmvet.py", "build_mmvet_gpt4_prompt"),
}


def of_checkout(path: str) -> Wording:
    """VLMEvalKit's wording, from the files of the checkout at `path`: their functions that build
    prompts are run, and nothing else of it is (its package would import torch).

    Raises:
      ConfigError: it has no such functions; the message names the file.
    """
    templates = {}
    for kind, (file, name) in _BUILDERS.items():
        function = _functions(_source(path, file)).get(name)
        if function is None:
            raise ConfigError(f"{os.path.join(path, 'vlmeval/dataset', file)} has no {name}()")
        templates[kind] = _of_choice(function) if file == _CHOICES else _of_line(function)
    rules, system = _dynamath(path)
    kinds = ("dynamath_choice", "dynamath_float", "dynamath_text")
    for kind, rule in zip(kinds, rules):
        templates[kind] = _of_dynamath(rule)
    source = f"VLMEvalKit's wording, {os.path.abspath(path)}{_commit(path)}"
    return Wording(source, templates, dict.fromkeys(kinds, system))


def _source(path: str, file: str) -> ast.Module:
    file = os.path.join(path, "vlmeval/dataset", file)
    try:
        with open(file, encoding="utf-8") as f:
            return ast.parse(f.read())
    except (OSError, SyntaxError) as error:
        raise ConfigError(f"{path} is no checkout of VLMEvalKit: {error}") from error


def _functions(module: ast.Module) -> dict:
    """The module's functions that build texts, without its imports and the rest of it."""
    kept = [
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef) and re.search("build|prompt|ICE", node.name)
    ]
    names: dict = {"re": re}
    exec(compile(ast.Module(kept, []), "VLMEvalKit", "exec"), names)
    return names


def _of_choice(function) -> Callable[[dict[str, str]], str]:
    return lambda slots: function(slots["question"], slots["options"], slots["prediction"])


def _of_line(function) -> Callable[[dict[str, str]], str]:
    def text(slots: dict[str, str]) -> str:
        return function(slots | {"question_for_eval": slots.get("question")})

    return text


def _of_dynamath(rule: str) -> Callable[[dict[str, str]], str]:
    return lambda slots: f"Free-form answer: {slots['prediction']}\nInstruction: {rule}"


def _dynamath(path: str) -> tuple[list[str], str]:
    """The three instructions (choice, float, other) and the system prompt of DynaMath's judge."""
    found = [], []
    for node in ast.walk(_source(path, "dynamath.py")):
        if isinstance(node, ast.FunctionDef) and node.name == "DynaMath_auxeval":
            found[0].extend(
                (part.lineno, ast.literal_eval(part.value))
                for part in ast.walk(node)
                if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "inst"
            )
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "model.system_prompt":
            found[1].append(ast.literal_eval(node.value))
    rules = [rule for _, rule in sorted(found[0])]
    if len(rules) != 3 or len(found[1]) != 1:
        raise ConfigError(f"{path}/vlmeval/dataset/dynamath.py is not as it was: no judge's prompt")
    return rules, found[1][0]


def _commit(path: str) -> str:
    """ ", commit abc" if git knows it."""
    try:
        with open(os.path.join(path, ".git/HEAD"), encoding="utf-8") as f:
            head = f.read().strip()
        if head.startswith("ref: "):
            with open(os.path.join(path, ".git", head[5:]), encoding="utf-8") as f:
                head = f.read().strip()
    except OSError:
        return ""
    return f", commit {head}"
