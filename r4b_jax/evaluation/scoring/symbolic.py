"""Equality of formulas: MathVision's (latex2sympy) and OlympiadBench's (sympy), as VLMEvalKit
decides them.

Both can hang on what a model writes, so callers go through `within`, which runs them in a process
of their own and ends that after as long as VLMEvalKit waits.
"""

import atexit
import contextlib
import functools
import json
import os
import queue
import selectors
import subprocess
import sys

from r4b_jax.evaluation.scoring import arithmetic

SECONDS = 30.0  # a comparison; VLMEvalKit's limit, after which it counts as not equal
START_SECONDS = 300.0  # until a new process has imported sympy
MEMORY = 8 * 2**30  # bytes a process may take
CLOSE = 1e-6


# In a process of its own


class _Worker:
    """One process that compares, started when first needed and again after it was ended."""

    def __init__(self):
        self._process = None

    def _start(self):
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if self._reply(START_SECONDS) != "ready":
            raise RuntimeError(
                "the process that compares formulas does not start: `python -c 'import sympy, "
                "latex2sympy2_extended, antlr4'` tells why"
            )

    def _reply(self, seconds: float):
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(seconds) else b""
        if not line:  # too slow, or dead
            self.end()
            return None
        return json.loads(line)

    def end(self):
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def ask(self, name: str, *args):
        if self._process is None or self._process.poll() is not None:
            self._start()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([name, *args]).encode() + b"\n")
            self._process.stdin.flush()
        return self._reply(SECONDS)


WORKERS = os.cpu_count() or 1  # so many threads can compare at once
_free: queue.LifoQueue = queue.LifoQueue()  # the one used last first: the others may never start
for _ in range(WORKERS):
    _free.put(_Worker())


@atexit.register
def _end_all():
    while not _free.empty():
        _free.get().end()


@functools.lru_cache(maxsize=100_000)
def within(name: str, *args) -> bool:
    """`mathvision_equal` or `olympiad_equal` of `args`, False if it takes longer than `SECONDS` or
    ends its process. For several threads."""
    worker = _free.get()
    try:
        return bool(worker.ask(name, *args))
    finally:
        _free.put(worker)


def serve():
    """What the process does: a line of JSON in, a line out."""
    import resource

    import sympy.parsing.latex  # noqa: F401  (half a second each: before the first deadline)
    from latex2sympy2_extended import antlr_parser

    # latex2sympy2_extended 1.11 has a grammar for each antlr4. That for 4.11, which VLMEvalKit
    # needs for OlympiadBench, lacks this rule, so a percentage has no value there.
    if hasattr(antlr_parser.PSParser.AtomContext, "FUNC_GAMMA"):
        del antlr_parser.PSParser.AtomContext.FUNC_GAMMA
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    sys.set_int_max_str_digits(1_000_000)
    out, sys.stdout = sys.stdout, sys.stderr  # what a parser prints is no answer
    print('"ready"', file=out, flush=True)
    functions = {f.__name__: f for f in (mathvision_equal, olympiad_equal)}
    for line in sys.stdin:
        name, *args = json.loads(line)
        try:
            found = bool(functions[name](*args))
        except Exception:
            found = False
        print(json.dumps(found), file=out, flush=True)


# MathVision


def mathvision_equal(reply: str, answer: str) -> bool:
    """Both are LaTeX that latex2sympy reads, and their values, or their difference, are close.

    The values are those of the expressions as Python text, so sqrt and pi have none, and then the
    difference is not looked at either.
    """
    from latex2sympy2_extended import latex2sympy

    a, b = latex2sympy(answer), latex2sympy(reply)
    names = {"a": a, "b": b}
    if abs(arithmetic.value(str(a), names) - arithmetic.value(str(b), names)) < CLOSE:
        return True
    return bool(abs(a - b) < CLOSE)


# OlympiadBench


def olympiad_equal(reply: str, answer: str, precision: float) -> bool:
    """One answer of OlympiadBench: the same text, the same interval, numbers closer than
    `precision`, the same expression, or the same equation but for a whole factor.

    "The same expression" means that sympy parses both to the same object: VLMEvalKit calls a helper
    that its authors commented out wherever they differ, so 0.5 is not \\frac{1}{2}.
    """
    if reply == answer and reply:
        return True
    if _is_interval(reply) and _is_interval(answer):
        try:
            if _same_intervals(reply, answer):
                return True
        except Exception:
            return False
    for same in (
        lambda: _close(reply, answer, precision),
        lambda: _same_expression(reply, answer) and not ("=" in reply and "=" in answer),
        lambda: _same_equation(reply, answer),
    ):
        try:
            if same():
                return True
        except Exception:
            continue
    return False


def _is_interval(text: str) -> bool:
    return text.startswith(("(", "[")) and text.endswith((")", "]"))


def _same_intervals(reply: str, answer: str) -> bool:
    parts = reply.split("\\cup"), answer.split("\\cup")
    if len(parts[0]) != len(parts[1]):
        return False
    for a, b in zip(*parts):
        if a[0] != b[0] or a[-1] != b[-1]:
            return False
        ends = a.strip("[]()").split(","), b.strip("[]()").split(",")
        if not all(_same_expression(x, y) for x, y in zip(*ends)):
            return False
    return True


def _close(reply: str, answer: str, precision: float) -> bool:
    a, b = float(reply), float(answer)
    return any(abs(x - b) <= precision * 1.01 for x in (a / 100, a, a * 100))


def _same_expression(reply: str, answer: str) -> bool:
    """Of an equation, what stands right of the first =.

    Raises:
      ArithmeticError: they differ. (VLMEvalKit's AttributeError; it ends the check of intervals.)
    """
    import sympy

    sides = [x.split("=")[1] if "=" in x else x for x in (reply, answer)]
    a, b = (sympy.sympify(parse_latex(side.strip())) for side in sides)
    if a == b:
        return True
    raise ArithmeticError(f"{a} is not {b}")


def _same_equation(reply: str, answer: str) -> bool:
    import sympy

    differences = []
    for equation in (reply, answer):
        left, right = (parse_latex(side) for side in equation.split("="))
        both = sympy.Eq(left, right)
        differences.append(sympy.simplify(both.lhs - both.rhs))
    a, b = differences
    factors = sympy.simplify(a / b), sympy.simplify(b / a)
    return any(factor.is_Integer and factor != 0 for factor in factors)


def parse_latex(latex: str):
    """sympy's LaTeX parser, also beside another antlr4 than its own 4.11: its tables are of a
    format that later ones read, but it refuses to try."""
    import antlr4
    from sympy.parsing.latex import _parse_latex_antlr as parser

    latex = latex.strip()
    listener = parser.MathErrorListener(latex)
    lexer = parser.LaTeXLexer(antlr4.InputStream(latex))
    tree = parser.LaTeXParser(antlr4.CommonTokenStream(lexer))
    for part in (lexer, tree):
        part.removeErrorListeners()
        part.addErrorListener(listener)
    return parser.convert_relation(tree.math().relation())
