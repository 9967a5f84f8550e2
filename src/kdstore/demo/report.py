"""The demo's report: one HTML page that opens offline, with the table, plots, pictures of the data and what each number comes from."""

from __future__ import annotations

import base64
import html
import io
import math
from pathlib import Path
from typing import Any

import kdstore
from kdstore.data import scenes
from kdstore.jsonfile import write_bytes

COLUMNS = {
    "image_retrieval_recall@1": "T&rarr;I R@1",
    "text_retrieval_recall@1": "I&rarr;T R@1",
    "image_retrieval_recall@5": "T&rarr;I R@5",
    "vqa overall": "VQA",
    **{f"vqa {kind}": kind.removeprefix("query ") for kind in scenes.QUESTION_TYPES},
}
KIND_COLORS = {"student": "#3465a4", "teacher": "#8f5902", "control": "#888a85"}


def table_as_markdown(content: dict[str, Any]) -> str:
    """Render the demo's table: millions of parameters with and without the token embedding, recall and VQA accuracy in percent."""
    header, rows = _cells(content)
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(html.unescape(c) for c in row)} |" for row in lines) + "\n"


def _cells(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for line in content["table"]:
        scores, spread, count = line["scores"], line["spread"], line["parameters"]
        cells = [_millions(count["total"]), _millions(count["without_token_embedding"])] if count else ["-", "-"]
        for column in COLUMNS:
            plus_minus = f" &plusmn; {spread[column]:.1f}" if column in spread else ""
            cells.append(f"{scores[column]:.1f}{plus_minus}" if column in scores else "-")
        rows.append([line["group"], *cells])
    return ["model", "params (M)", "without tokens", *COLUMNS.values()], rows


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


def write_report(path: Path, content: dict[str, Any]) -> Path:
    """Write the page; `content` is what demo.json holds."""
    header, rows = _cells(content)
    head = "".join(f"<th scope=col>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr class={line['kind']}><th scope=row>{html.escape(row[0])}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
        for row, line in zip(rows, content["table"], strict=True)
    )
    config = content["config"]
    page = _PAGE.format(
        style=_STYLE,
        samples=f"{config['samples']:,}",
        images=f"{config['images']:,}",
        seeds=", ".join(map(str, config["seeds"])),
        loss=html.escape(config["loss"]),
        head=head,
        body=body,
        gains="".join(f"<li>{_gain(d)}</li>" for d in content["differences"]),
        bars=_figure(_plot_kinds(content), "VQA accuracy by question kind for every model, with the chance level of each kind"),
        recall=_figure(_plot_recall(content), "Recall of students and teachers"),
        curves=_figure(_plot_curves(content), "Contrastive loss on the training pairs over samples seen, one line per student"),
        pictures="".join(_picture(i) for i in range(6)),
        stores="".join(f"<li>{html.escape(name)}: <code>{digest}</code></li>" for name, digest in content["stores"].items()),
        digest=content["config_digest"],
        version=kdstore.__version__,
        seconds=content["seconds"]["all"],
    )
    write_bytes(path, page.encode())
    return path


def _gain(difference: dict[str, Any]) -> str:
    spread = f" &plusmn; {difference['spread']:.1f} (95 % interval over paired seeds)" if difference["spread"] is not None else " (one seed)"
    return f"{html.escape(difference['teacher'])}, {html.escape(difference['score'])}: {difference['gain']:+.1f} points{spread}"


def _axes(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _plot_kinds(content: dict[str, Any]) -> Any:
    axes = _axes(9, 3.6)
    shown = [line for line in content["table"] if line["group"] != "vocabulary-oracle"]
    kinds = ["overall", *scenes.QUESTION_TYPES]
    width = 0.8 / len(shown)
    for k, line in enumerate(shown):
        places = [x + (k - (len(shown) - 1) / 2) * width for x in range(len(kinds))]
        shade = 0.45 + 0.55 * k / len(shown)
        heights = [line["scores"].get(f"vqa {kind}", math.nan) for kind in kinds]
        errors = [line["spread"].get(f"vqa {kind}", 0) for kind in kinds] if line["spread"] else None
        axes.bar(places, heights, width, yerr=errors, color=KIND_COLORS[line["kind"]], alpha=shade, label=line["group"])
    for x, kind in enumerate(kinds):
        if kind in content["chance"]:
            axes.hlines(content["chance"][kind], x - 0.45, x + 0.45, colors="#cc0000", linestyles="dashed", label="chance" if kind == "exist" else None)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("VQA accuracy (%)")
    axes.legend(fontsize=7, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return axes


def _plot_recall(content: dict[str, Any]) -> Any:
    axes = _axes(6, 2.6)
    shown = [line for line in content["table"] if "image_retrieval_recall@1" in line["scores"]]
    for y, line in enumerate(reversed(shown)):
        color = KIND_COLORS[line["kind"]]
        axes.barh(y + 0.2, line["scores"]["image_retrieval_recall@5"], 0.36, color=color, alpha=0.45, label="R@5" if y == 0 else None)
        axes.barh(y - 0.2, line["scores"]["image_retrieval_recall@1"], 0.36, color=color, label="R@1" if y == 0 else None)
    axes.set_yticks(range(len(shown)), [line["group"] for line in reversed(shown)])
    axes.set_xlabel("recall of the image by its caption (%)")
    axes.legend(fontsize=8, frameon=False)
    return axes


def _plot_curves(content: dict[str, Any]) -> Any:
    axes = _axes(6, 2.6)
    for group, curve in content["curves"].items():
        axes.plot([p["samples"] for p in curve], [p["loss"] for p in curve], label=group, linewidth=1.2)
    axes.set_xlabel("samples seen")
    axes.set_ylabel("contrastive loss")
    axes.set_yscale("log")
    axes.legend(fontsize=7, frameon=False)
    return axes


def _figure(axes: Any, alternative: str) -> str:
    sink = io.StringIO()
    axes.figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    svg = sink.getvalue()
    return f'<figure role="img" aria-label="{html.escape(alternative)}">{svg[svg.index("<svg") :]}<figcaption>{html.escape(alternative)}</figcaption></figure>'


def _picture(index: int) -> str:
    """One test scene with its questions and answers."""
    scene = scenes.make_scene("test", index)
    sink = io.BytesIO()
    scenes.draw(scene).resize((160, 160), 0).save(sink, "PNG")
    asked = "".join(f"<li>{html.escape(q.question)} <b>{html.escape(q.truth)}</b></li>" for q in scenes.questions("test", index, scene))
    caption = html.escape(scenes.captions(scene, "test", index)[0].text)
    source = f"data:image/png;base64,{base64.b64encode(sink.getvalue()).decode()}"
    return f'<div class=scene><img src="{source}" width=160 height=160 alt="{caption}"><p>{caption}</p><ul>{asked}</ul></div>'


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1.5rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th[scope=row] { text-align: left; font-weight: 600; } tr.control { opacity: .75; } tr.teacher { background: var(--soft); }
figure { margin: 1rem 0; background: #fff; color: #222; border-radius: 8px; padding: .5rem; overflow-x: auto; } figure svg { max-width: 100%; height: auto; }
figcaption { font-size: .85rem; color: #444; } .scenes { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem; }
.scene { background: var(--soft); border-radius: 8px; padding: .8rem; font-size: .85rem; } .scene img { image-rendering: pixelated; border-radius: 4px; }
.scene ul { padding-left: 1.1rem; margin: 0; } code { font-size: .75rem; overflow-wrap: anywhere; }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>kdstore demo</title><style>{style}</style></head><body>
<h1>Do better teachers make better students?</h1>
<p>One student, trained on the same {samples} pairs from {images} built-in scenes in the same order: alone, and distilled (<code>{loss}</code>) from
each teacher's cached features. Every model is then scored alike: recall on scenes of their own split with unique captions, and visual question
answering by one head trained on its frozen image tokens. Seeds: {seeds}. All scores in percent.</p>
<h2>Results</h2><div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p>Controls: <b>question-only</b> sees no image, <b>untrained student</b> is the student's architecture with random weights under the same head, and
<b>vocabulary-oracle</b> always picks the best answer of the vocabulary.</p>
<h2>What a teacher adds to the student alone</h2><ul>{gains}</ul>
<h2>Visual question answering by question kind</h2>{bars}
<h2>Retrieval</h2>{recall}<h2>Training</h2>{curves}
<h2>The scenes</h2><div class="scenes">{pictures}</div>
<h2>Where the numbers come from</h2><p>kdstore {version}, {seconds} s in this run, configuration <code>{digest}</code>. Stores:</p><ul>{stores}</ul>
<p>Each result file in <code>results/</code> names the weights, the data, the metric's version and the seed behind it.
Repeat it with <code>kdstore demo</code>.</p>
</body></html>
"""
