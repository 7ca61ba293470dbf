"""The report of a benchmark run: report.md, report.html (one file, figures within), report.json and
the figures, in the paper's form and beside the paper's figures."""

import base64
import html
import json
import os
import re
from collections.abc import Sequence

import numpy as np

from r4b_jax.data.dialogue import MODES
from r4b_jax.evaluation import paper
from r4b_jax.evaluation.benchmarks import PAPER_ROWS
from r4b_jax.evaluation.records import write_whole
from r4b_jax.evaluation.report import COLOURS, markdown_table, plt
from r4b_jax.evaluation.scoring.contract import DIFFERENCES, PROFILES
from r4b_jax.evaluation.scoring.wording import OWN

NAMES_SHOWN = 8  # of queries set aside, for each reason
COUNTS = ("truncated", "empty", "refused", "neither_mode", "unjudged")
FIGURES = {
    "The paper's table": "table.png",
    "Tokens a query and think rate (the paper's figure 7)": "tokens.png",
}


def about(name: str, profile: str, settings: dict, any_file: bool, started: str) -> dict:
    """What a report says of its run."""
    commit = PROFILES[profile].commit
    out = {"name": name, "profile": profile, "commit": commit, "any_file": any_file}
    return out | {"started": started, "settings": settings}


def judge(asked) -> dict | None:
    """What a report says of its judge."""
    if asked is None:
        return None
    names = ("asked", "failed", "fault")
    told = {name: getattr(asked, name) for name in names if hasattr(asked, name)}
    config = getattr(asked, "config", None)
    told["model"] = getattr(config, "model", type(asked).__name__)
    return told | {"url": getattr(config, "url", ""), "wording": asked.wording.source}


def write(content: dict, out: str):
    """Write the report; `content` is that of report.json, but for what is derived from it here."""
    content["table"], content["remarks"] = _lines(content), _remarks(content)
    for path, draw in zip(FIGURES.values(), (_draw_table, _draw_tokens)):
        figure = draw(content)
        figure.savefig(os.path.join(out, path), dpi=110, bbox_inches="tight")
        plt.close(figure)
    write_whole(os.path.join(out, "report.md"), _markdown(content))
    write_whole(os.path.join(out, "report.html"), _html(content, out))
    write_whole(os.path.join(out, "report.json"), json.dumps(content, indent=1, default=str))


# What is told


def _modes(content: dict) -> list[str]:
    return [mode for mode in MODES if mode in content["about"]["settings"]["modes"]]


def _lines(content: dict) -> list[dict]:
    """The rows of the paper's table that were run, then benchmarks it has no row for: {"title",
    "benchmarks", "scores", "doubtful", "no_answer", "paper"}."""
    found, lines = content["benchmarks"], []
    titles = {title: names for title, names in PAPER_ROWS.items() if set(names) & set(found)}
    known = {name for names in titles.values() for name in names}
    titles |= {part["title"]: (name,) for name, part in found.items() if name not in known}
    for title, names in titles.items():
        parts = [found[name] for name in names if name in found]
        line = {"title": title, "benchmarks": list(names), "scores": {}, "doubtful": {}}
        line |= {"no_answer": {}, "paper": list(paper.TABLE.get(title, ()))}
        for mode in _modes(content):
            cells = [part["modes"][mode] for part in parts]
            heads = [cell["score"] for cell in cells]
            whole = len(parts) == len(names) and None not in heads
            line["scores"][mode] = float(np.mean(heads)) if whole else None
            left_out = sum(len(part["set_aside"]) for part in parts)
            line["doubtful"][mode] = sum(cell["unjudged"] for cell in cells) + left_out
            answered = sum(cell["answered"] for cell in cells)
            silent = sum(cell["truncated"] + cell["empty"] for cell in cells)
            line["no_answer"][mode] = silent / answered if answered else None
        lines.append(line)
    return lines


def _mean(lines: list[dict], modes: Sequence[str]) -> dict | None:
    """The means over the rows that have every score and a figure in the paper."""
    whole = [x for x in lines if x["paper"] and None not in x["scores"].values()]
    if len(whole) < 2:
        return None
    return {
        "title": f"mean of {len(whole)} rows",
        "scores": {mode: float(np.mean([x["scores"][mode] for x in whole])) for mode in modes},
        "doubtful": {mode: sum(x["doubtful"][mode] for x in whole) for mode in modes},
        "no_answer": {mode: None for mode in modes},
        "paper": np.mean([x["paper"] for x in whole], 0).tolist(),
    }


def _remarks(content: dict) -> list[str]:
    """Why the numbers may not compare with the paper's."""
    told, settings, found = content["about"], content["about"]["settings"], content["benchmarks"]
    tokens, who, out = settings["generate"]["max_new_tokens"], content["judge"], []
    if told["profile"] != paper.PROFILE:
        out.append(f"Rules are those of profile {told['profile']}, the paper's {paper.PROFILE}.")
    if told["any_file"]:
        out.append("Tables of any md5 were taken: they need not be VLMEvalKit's.")
    if settings["limit"]:
        out.append(f"Only the first {settings['limit']} queries of each benchmark were asked.")
    if tokens != paper.MAX_NEW_TOKENS:
        out.append(f"Replies have at most {tokens} tokens, the paper's {paper.MAX_NEW_TOKENS}.")
    if settings["think_bias"]:
        out.append(f"In auto mode the logit of thinking was raised by {settings['think_bias']:g}.")
    needs = {part["title"] for part in found.values() if part["judge"] == "needed"}
    helps = {part["title"] for part in found.values() if part["judge"] == "rescue"}
    if who is None and needs:
        out.append(
            f"There was no judge. What rules cannot decide of {', '.join(sorted(needs))} is "
            "unjudged, outside the mean: what remains is the easy part."
        )
    if who is None and helps:
        out.append(
            f"There was no judge. What rules cannot read of {', '.join(sorted(helps))} is wrong."
        )
    if who and who["model"] != paper.JUDGE:
        out.append(f"The judge was {who['model']}, the paper's {paper.JUDGE}.")
    if who and who["wording"] == OWN:
        out.append("The judge was asked in our own words, not in VLMEvalKit's (--vlmevalkit).")
    if who and who.get("fault"):
        out.append(f"The judge was given up: {who['fault']}")
    titles = {part["title"] for part in found.values()}
    if "WeMath" in titles and (settings["limit"] or told["any_file"]):
        out.append("WeMath's score takes problems that were not asked for right ones.")
    return out + [f"{title} is {text}." for title, text in paper.OPEN.items() if title in titles]


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def score_table(content: dict) -> tuple[list[str], list[list[str]], list[list[bool]]]:
    """The paper's table: headers, rows, and which cell is the best of its row."""
    modes = _modes(content)
    headers = ["benchmark", *modes, *paper.COLUMNS, "no answer %"]
    lines = content["table"]
    mean = _mean(lines, modes)
    rows, best = [], []
    for line in [*lines, *([mean] if mean else [])]:
        values = [line["scores"][mode] for mode in modes]
        values += line["paper"] or [None] * len(paper.COLUMNS)
        top = max((round(x, 1) for x in values if x is not None), default=None)
        cells = [number(value) for value in values]
        for i, mode in enumerate(modes):
            cells[i] += "†" if line["doubtful"][mode] else ""
        silent = [_percent(line["no_answer"][mode]) for mode in modes]
        silent = "" if line is mean else " / ".join(silent)
        rows.append([line["title"], *cells, silent])
        best.append([False, *(x is not None and round(x, 1) == top for x in values), False])
    return headers, rows, best


def count_table(content: dict) -> tuple[list[str], list[list[str]]]:
    """Every count behind the scores: a row a benchmark and mode."""
    headers = ["benchmark", "mode", "queries", "set aside", "score", "thinks %", "tokens"]
    headers += [name.split("_")[0] for name in COUNTS]
    headers += ["asked", "VLMEvalKit's"]
    rows = []
    for part in content["benchmarks"].values():
        for i, (mode, cell) in enumerate(part["modes"].items()):
            first = [part["dataset"] if i == 0 else "", mode, str(part["rows"])]
            row = [*first, str(len(part["set_aside"])), number(cell["score"])]
            row += [_percent(cell["think_rate"]), number(cell["tokens"])]
            row += [str(cell[name]) for name in COUNTS]
            rows.append([*row, str(cell["asked"]), number(cell["vlmevalkit_score"])])
    return headers, rows


def aside_lines(content: dict) -> list[str]:
    """Queries without a record, by benchmark and reason."""
    lines = []
    for part in content["benchmarks"].values():
        reasons: dict[str, list[str]] = {}
        for index, reason in part["set_aside"].items():
            reasons.setdefault(reason, []).append(index)
        for reason, ids in reasons.items():
            more = f" and {len(ids) - NAMES_SHOWN} more" if len(ids) > NAMES_SHOWN else ""
            lines.append(f"{part['dataset']} {', '.join(ids[:NAMES_SHOWN])}{more}: {reason}")
    return lines


def _introduction(content: dict) -> list[str]:
    told, who = content["about"], content["judge"]
    settings = told["settings"]
    tokens = settings["generate"]["max_new_tokens"]
    asked = "No judge." if who is None else f"Judge: {who['model']}, {who['wording']}."
    return [
        f"Scores are VLMEvalKit's in profile {told['profile']} (commit {told['commit'][:10]}), "
        f"0 to 100. Replies are greedy, of at most {tokens} tokens. {asked}",
        "A reply without an end has no answer: the prediction is empty, and counts as truncated. "
        "† some queries have no score, as none could judge them or their picture cannot be read: "
        "the number is the mean of the others. "
        "*No answer* is the share of queries that are truncated or empty, mode by mode. Columns "
        f"with names of models are the paper's figures ({paper.SOURCE}). A row's best is bold.",
    ]


COUNTED = (
    "*truncated*: no end within the limit; *empty*: an end and no answer; *refused*: an answer "
    "that reads as a refusal; *neither*: auto mode began with neither mode's token; *unjudged*: "
    "a judge had to decide and did not; *asked*: questions to the judge; *VLMEvalKit's*: the "
    "score where unjudged queries and those set aside count as VLMEvalKit counts them, mostly as "
    "wrong."
)


def _command(content: dict) -> str:
    name = content["about"]["name"]
    modes = ", ".join(f"{name}-{mode}" for mode in _modes(content))
    return (
        "VLMEvalKit scores the same predictions with PRED_FORMAT=tsv and run.py --mode eval "
        f"--work-dir {{this folder}} --model one of {modes} --data DATASET. For queries set aside "
        "it sees an empty prediction; a run with --limit has no such files."
    )


def _markdown(content: dict) -> str:
    headers, rows, best = score_table(content)
    rows = [[f"**{x}**" if b else x for x, b in zip(*pair)] for pair in zip(rows, best)]
    parts = [f"# {content['about']['name']}: benchmarks", *_introduction(content)]
    parts.append(markdown_table(headers, rows))
    if content["remarks"]:
        lines = "\n".join(f"- {text}" for text in content["remarks"])
        parts += ["## What does not compare with the paper", lines]
    parts += [f"## {title}\n\n![{title}]({path})" for title, path in FIGURES.items()]
    parts += ["## Every count", COUNTED, markdown_table(*count_table(content))]
    if lines := aside_lines(content):
        parts += ["## Set aside", "\n".join(f"- {line}" for line in lines)]
    parts += ["## To score it again", _command(content)]
    return "\n\n".join(parts) + "\n"


# HTML

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --mark: #c60; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em; }
h1 { margin-bottom: .2em } h2 { margin: 2em 0 .5em; font-size: 1.2em }
p { max-width: 75ch } .scroll { overflow-x: auto } figure { margin: 1em 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap;
  font-size: 13.5px }
th, td { padding: .22em .6em; text-align: right; border-bottom: 1px solid var(--line) }
th { font-weight: 600; border-bottom-width: 2px } th.own, td.own { background: var(--soft) }
th.text, td.text { text-align: left } tr.last td { border-top: 2px solid var(--line) }
td.best { font-weight: 700 } i { font-style: normal; display: inline-block; width: 0 }
td.some { color: var(--mark); font-weight: 600 }
tr:hover td { background: var(--soft) } img { max-width: 100%; background: #fff; padding: 8px }
summary { cursor: pointer; padding: .2em 0 } li { max-width: 90ch }
"""


def _html_table(headers, rows, classes) -> str:
    """Args: classes: function (row, column) -> classes of a cell; row -1 = the headers."""

    def cells(tag: str, number: int, texts) -> str:
        return "".join(
            f'<{tag} class="{classes(number, column)}">{_hung(html.escape(text))}</{tag}>'
            for column, text in enumerate(texts)
        )

    lines = [f"<tr>{cells('th', -1, headers)}</tr>"]
    for i, row in enumerate(rows):
        last = ' class="last"' if row[0].startswith("mean of ") else ""
        lines.append(f"<tr{last}>{cells('td', i, row)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _marked(text: str) -> str:
    """Markdown's emphasis as HTML's."""
    return re.sub(r"\*(.+?)\*", r"<em>\1</em>", html.escape(text))


def _hung(text: str) -> str:
    """A mark after a number takes no room, so that the digits stand in line."""
    return text.replace("†", "<i>†</i>")


def _html(content: dict, out: str) -> str:
    headers, rows, best = score_table(content)
    own = len(_modes(content))

    def score_class(row: int, column: int) -> str:
        if column == 0:
            return "text"
        mine = "own " if column <= own else ""
        return mine + ("best" if row >= 0 and best[row][column] else "")

    title = html.escape(f"{content['about']['name']}: benchmarks")
    parts = [f"<h1>{title}</h1>", *(f"<p>{_marked(x)}</p>" for x in _introduction(content))]
    parts.append(_html_table(headers, rows, score_class))
    parts += _html_list("What does not compare with the paper", content["remarks"])
    for name, path in FIGURES.items():
        if path == "table.png":
            continue  # it is a table already
        with open(os.path.join(out, path), "rb") as f:
            data = base64.b64encode(f.read()).decode()
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts.append(f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
        parts.append("</figure>")
    counted, counts = count_table(content)
    odd = [counted.index(name.split("_")[0]) for name in COUNTS]
    odd.append(counted.index("set aside"))

    def count_class(row: int, column: int) -> str:
        if column < 2:
            return "text"
        return "some" if row >= 0 and column in odd and counts[row][column] != "0" else ""

    parts += ["<h2>Every count</h2>", f"<p>{_marked(COUNTED)}</p>"]
    parts.append(_html_table(counted, counts, count_class))
    parts += _html_list("Set aside", aside_lines(content))
    parts += ["<h2>VLMEvalKit's own tables</h2>", *_html_details(content)]
    parts += ["<h2>To score it again</h2>", f"<p>{html.escape(_command(content))}</p>"]
    parts.append(_html_folded("Where scores cannot be VLMEvalKit's", _html_items(DIFFERENCES)))
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{title}</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _html_items(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(x)}</li>' for x in lines)}</ul>"


def _html_list(title: str, lines: Sequence[str]) -> list[str]:
    return [f"<h2>{html.escape(title)}</h2>", _html_items(lines)] if lines else []


def _html_folded(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def _html_details(content: dict) -> list[str]:
    out = []
    for part in content["benchmarks"].values():
        tables = []
        for mode, cell in part["modes"].items():
            names = list(dict.fromkeys(name for row in cell["table"] for name in row))
            rows = [[_cell_text(row.get(name)) for name in names] for row in cell["table"]]
            tables.append(f"<p>{mode}: the score is {html.escape(cell['score_name'])}</p>")
            tables.append(_html_table(names, rows, lambda _, column: "" if column else "text"))
        out.append(_html_folded(part["dataset"], "".join(tables)))
    return out


def _cell_text(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


# Figures


def _draw_table(content: dict):
    """The paper's table as a picture."""
    headers, rows, best = score_table(content)
    own, widths = len(_modes(content)), [3.6, *[2.1] * (len(headers) - 2), 3.0]
    edges = np.cumsum([0, *widths])
    height = len(rows) + 1
    figure, axis = plt.subplots(figsize=(edges[-1] * 0.58, height * 0.27 + 0.3))
    axis.set(xlim=(0, edges[-1]), ylim=(height + 0.1, -0.1))
    axis.axis("off")
    axis.axvspan(edges[1], edges[1 + own], color=COLOURS["auto"], alpha=0.08, lw=0)
    for i, row in enumerate([headers, *rows]):
        for column, text in enumerate(row):
            bold = i == 0 or best[i - 1][column]
            style = dict(va="center", fontsize=8 if i else 7.5, weight="bold" if bold else "normal")
            if column == 0:
                axis.text(0.1, i + 0.5, text, ha="left", **style)
                continue
            right = edges[column + 1] - 0.25
            axis.text(right, i + 0.5, text.rstrip("†"), ha="right", **style)
            axis.text(right, i + 0.5, "†" if text.endswith("†") else "", ha="left", **style)
    for y in (0, 1, height, *([height - 1] if rows and rows[-1][0].startswith("mean") else [])):
        axis.axhline(y, color="black", lw=1.0 if y in (0, height) else 0.6)
    return figure


def _draw_tokens(content: dict):
    """Bars of tokens by mode, with the paper's as rings, and the think rate of auto mode."""
    modes, parts = _modes(content), list(content["benchmarks"].values())
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(10.5, 1.3 + 0.36 * len(parts)),
        sharey=True,
        width_ratios=(2.4, 1),
        layout="constrained",
    )
    places, size = np.arange(len(parts)), 0.84 / len(modes)
    for i, mode in enumerate(modes):
        values = [part["modes"][mode]["tokens"] or 0 for part in parts]
        at = places + (i - (len(modes) - 1) / 2) * size
        bars = left.barh(at, values, size * 0.9, color=COLOURS[mode], label=mode)
        left.bar_label(bars, [f"{v:.0f}" for v in values], fontsize=6, padding=3)
        told = [paper.TOKENS.get(part["title"], {}).get(mode) for part in parts]
        known = [(value, y) for value, y in zip(told, at) if value is not None]
        if known:
            left.plot(*zip(*known), "o", mfc="white", mec="black", ms=5)
    if any(part["title"] in paper.TOKENS for part in parts):
        left.plot([], [], "o", mfc="white", mec="black", ms=5, label="the paper's")
    left.set_yticks(places, [part["dataset"] for part in parts], fontsize=8)
    left.set(ylim=(len(parts) - 0.4, -0.6), xlabel="tokens a query, after <think>")
    left.set_xlim(0, max(left.get_xlim()[1], 1))
    mode = "auto" if "auto" in modes else modes[0]
    rates = [100 * (part["modes"][mode]["think_rate"] or 0) for part in parts]
    bars = right.barh(places, rates, 0.6, color=COLOURS[mode])
    right.bar_label(bars, [f"{rate:.0f}" for rate in rates], fontsize=7, padding=3)
    right.set(xlim=(0, 112), xlabel=f"think rate in {mode} mode, %")
    right.set_xticks(range(0, 101, 25))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, frameon=False, ncols=len(handles[0]), loc="outside upper center")
    return figure
