"""Python arithmetic without Python's eval: what MathVision's equality needs of it.

VLMEvalKit runs eval() on the model's reply. Here only numbers, operators, comparisons and a few
functions of numbers have a value; what else Python could do with a reply (strings, indexing,
lambda, imports, attributes) has none, and counts as not equal.
"""

import ast
import operator
import warnings

LONGEST_POWER = (
    1_000_000  # bits of a power or a shift; more would take VLMEvalKit's 30 seconds, too
)
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}
_UNARY = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
}
_COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS = {f.__name__: f for f in (abs, bool, float, int, max, min, pow, round)}


class TooLarge(ArithmeticError):
    """The value has more digits than anyone would wait for."""


def value(expression: str, names: dict | None = None):
    """The value of `expression`; `names` are the variables it may use.

    Raises:
      TooLarge: see there.
      Exception: it has none, whatever the reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "1if" and the like
        tree = ast.parse(expression.strip(), mode="eval")
    return _value(tree.body, names or {})


def _value(node: ast.expr, names: dict):
    match node:
        case ast.Constant(value=int() | float() | complex() as number):
            return number
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, names), _value(right, names)
            _bound(op, a, b)
            return _BINARY[type(op)](a, b)
        case ast.UnaryOp(op=op, operand=operand):
            return _UNARY[type(op)](_value(operand, names))
        case ast.BoolOp(op=op, values=values):
            for part in values:
                found = _value(part, names)
                if bool(found) == isinstance(op, ast.Or):
                    break
            return found
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            a, found = _value(left, names), True
            for op, right in zip(ops, comparators):
                b = _value(right, names)
                if not (found := _COMPARE[type(op)](a, b)):
                    break
                a = b
            return found
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            found = [_value(arg, names) for arg in args]
            if name == "pow" and len(found) == 2:
                _bound(ast.Pow(), *found)
            return _FUNCTIONS[name](*found)
    raise ValueError(f"no arithmetic: {ast.dump(node)[:100]}")


def _bound(op: ast.operator, a, b):
    """Refuse a power or shift that would fill the memory."""
    if isinstance(a, int) and isinstance(b, int):
        power = isinstance(op, ast.Pow) and abs(b) * a.bit_length() > LONGEST_POWER
        shift = isinstance(op, ast.LShift) and b + a.bit_length() > LONGEST_POWER
        if power or shift:
            raise TooLarge(f"{type(op).__name__} of {str(a)[:20]} and {str(b)[:20]}")
