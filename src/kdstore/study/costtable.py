"""The cost of a study as a person reads it, in a terminal."""

from __future__ import annotations

from kdstore.study.cost import STAGES, Amount, Line, StudyCost

SHARES_OF_PEAK = (0.1, 0.2, 0.4)


def cost_text(cost: StudyCost) -> str:
    """Return tables of stages and of models, the rates, what must be fetched, and what is assumed."""
    total, left = cost.total(), cost.total(left=True)
    parts = [
        f"{cost.name}: {cost.arms} arms, {cost.cells} cells; {total.tasks} tasks to extract, train and score, {total.tasks - left.tasks} of them done",
        _table([("", *_HEADS), *((name, *_stage(cost, name)) for name in STAGES), ("all", *_row(total, left, ""))]),
        *(part for name in STAGES for part in _models(cost, name)),
        _rates(cost, left),
        *(_downloads(cost) if cost.downloads else ()),
        *cost.notes,
    ]
    return "\n\n".join(parts)


_HEADS = ("tasks", "done", "samples", "GMACs", "hours left", "bytes left")


def _stage(cost: StudyCost, name: str) -> tuple[str, ...]:
    return _row(cost.stage(name), cost.stage(name, left=True), STAGES[name])


def _row(whole: Amount, left: Amount, samples_are: str) -> tuple[str, ...]:
    done = whole.tasks - left.tasks
    samples = f"{_count(whole.samples)} {samples_are}" if samples_are else ""
    return (str(whole.tasks), str(done), samples, _count(whole.gmacs), _hours(left.seconds), _bytes(left.bytes) if whole.bytes else "")


def _models(cost: StudyCost, stage: str) -> list[str]:
    """Return the table of a stage's models, where there is more than one of them."""
    lines = [line for line in cost.lines if line.stage == stage]
    served = stage == "extract"
    if len(lines) < 2 and not served:
        return []
    heads = (stage, *_HEADS, *(["runs that read it"] if served else []))
    return [_table([heads, *((line.model, *_row(line.all, line.left, STAGES[stage]), *_served(line, served)) for line in lines)])]


def _served(line: Line, served: bool) -> tuple[str, ...]:
    return (str(line.readers),) if served else ()


def _rates(cost: StudyCost, left: Amount) -> str:
    """Say where the hours are from; without rates, what they would be at shares of a peak."""
    rates = cost.rates
    if rates is not None:
        speeds: dict[str, list[str]] = {}
        for name, rate in rates.encode.items():
            training = f", in training {rates.train[name]:,.5g}" if name in rates.train else ""
            speeds.setdefault(f"{rate:,.5g} GMAC/s{training}", []).append(name)
        more = [f"{rates.questions:,.0f} questions/s that a head learns from"] if rates.questions else []
        more += [f"{rates.images_read:,.0f} images/s read"] if rates.images_read else []
        more += [f"{rates.start:.1f} s to start a task"] if rates.start else []
        return "\n".join(
            [
                f"Hours are of {rates.device}, one task at a time ({rates.source}):",
                *(f"  {', '.join(names)}: {speed}" for speed, names in speeds.items()),
                *(f"  {said}" for said in more),
            ]
        )
    given = cost.given
    if given.peak_gmacs_per_second is None:
        return "Hours are not known: the data are not here, and [cost] gives no rate (docs/study.md)."
    said = ", ".join(f"{_hours(left.gmacs / (share * given.peak_gmacs_per_second))} at {share:.0%}" for share in SHARES_OF_PEAK)
    peak = f"a peak of {given.peak_gmacs_per_second:,.0f} GMAC/s ({given.source})"
    return f"Assumption, not a measurement: hours of {given.device} at shares of {peak}: {said}."


def _downloads(cost: StudyCost) -> list[str]:
    """Return the table of what must be fetched and is not here."""
    rows = [(d.what, d.origin, _bytes(d.bytes) if d.bytes else "not known", d.licence, "here" if d.here else "") for d in cost.downloads]
    missing = _bytes(sum(d.bytes or 0 for d in cost.downloads if not d.here))
    table = _table([("to fetch", "from", "bytes", "licence", ""), *rows])
    return [f"{table}\nNot here: {missing}, and what has no size above. Weights count four bytes a parameter."]


def _table(rows: list[tuple[str, ...]]) -> str:
    """Align columns; the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numbers = "tasks" in rows[0]
    return "\n".join(
        "  ".join(cell.rjust(width) if numbers and column else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )


def _count(number: float) -> str:
    """Write a count in at most four digits: 12,800,000 is 12.8 M."""
    for factor, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}" if number < 1000 * factor else f"{number / factor:,.0f}{unit}"
    return f"{number:,.0f}"


def _bytes(number: float) -> str:
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}" if number < 1000 * factor else f"{number / factor:,.0f} {unit}"
    return f"{number:.0f} B"


def _hours(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}" if hours >= 0.1 else f"{hours:.2f}"
