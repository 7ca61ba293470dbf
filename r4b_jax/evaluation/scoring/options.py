"""Which option a reply chose: VLMEvalKit's matcher, which all multiple choice passes through.

It looks at letters, then (profile head) for "answer is B", then for the text of an option. Where it
is known to be wrong it is wrong here too: "answer is based on" is B, "none" holds the option "no".
"""

import ast
import re
import string

from r4b_jax.evaluation.scoring.contract import FAILED, Cell, Profile, Row, text

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
FROM_END = 4  # words; a letter earlier than these is not the answer
NONE = "Z"  # no option: of a refusal, or by the judge


def of_row(row: Row) -> dict[str, Cell]:
    """The options of a row: its columns A to Z that are not missing."""
    return {x: row[x] for x in string.ascii_uppercase if row.get(x) is not None}


def of_list(cell: Cell) -> dict[str, Cell]:
    """The options in a cell with a Python list; none if it holds no list."""
    found = literal(cell)
    return dict(zip(string.ascii_uppercase, found)) if isinstance(found, list | tuple) else {}


def literal(cell: Cell):
    """What a cell with a Python literal holds, or the cell. (VLMEvalKit runs eval on it.)"""
    try:
        return ast.literal_eval(text(cell).strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return cell


def listed(options: dict[str, Cell]) -> str:
    """The options as judges are shown them."""
    return "There are several options: \n" + "".join(f"{x}. {t}\n" for x, t in options.items())


def match(reply: str, options: dict[str, Cell], profile: Profile) -> str | None:
    """The letter that `reply` chose, `NONE` for a refusal, or None."""
    return _by_letter(reply, options, profile) or _by_text(reply, options)


def _by_letter(reply: str, options: dict[str, Cell], profile: Profile) -> str | None:
    if FAILED.rstrip(".") in reply:
        return None
    if any(refusal in reply for refusal in REFUSALS):
        return NONE
    words = reply.translate(_SEPARATORS).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1 and words.index(found[0]) >= len(words) - FROM_END:
        return found[0]
    if not found and NONE in words:
        return NONE
    if profile.answer_is_phrase and (phrase := _ANSWER_IS.search(reply)):
        letter = phrase[1].upper()
        return letter if letter in options else None
    return None


def _by_text(reply: str, options: dict[str, Cell]) -> str | None:
    reply = reply.lower()
    if len(reply) > 2 * sum(len(text(option)) for option in options.values()):
        return None
    found = [letter for letter, option in options.items() if text(option).lower() in reply]
    return found[0] if len(found) == 1 else None
