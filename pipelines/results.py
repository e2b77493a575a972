"""Tables and pictures of `yan compare`'s reports, and the page that gathers them.

python -m pipelines.results docs/results/*.json --page docs/RESULTS.md --short README.md
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.folders import difference
from yan_core.bootstrap import paired_difference
from yan_core.config import RunConfig, from_dict, to_dict
from yan_core.files import write_file
from yan_core.metrics import scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = Mapping[str, Any]
"""What `pipelines.compare.compare` and `pipelines.benchmarks.quality_gpu` give."""

MAIN_STEPS = 3
"""Solver steps that stand for YAN where one figure must do."""


NEAR = 0.01
"""As good as the best: no more than a point below it."""


def main_quality(contestant: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures that stand for a contestant: YAN at three steps, masked diffusion at the fewest that are as good."""
    quality = contestant["quality"]
    if contestant["family"] == "yan":
        return min(quality, key=lambda q: abs(q["num_steps"] - MAIN_STEPS))
    return fewest(quality)


def is_of_changes(report: Report) -> bool:
    """Whether changes to YAN alone were compared."""
    return all(of["family"] == "yan" for of in report["contestants"].values())


def fewest(quality: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The figures at the fewest steps that are within a point of the best at any number of them."""
    best = max(q["value"] for q in quality)
    return min((q for q in quality if q["value"] >= best - NEAR), key=lambda q: q["num_steps"])


def is_baseline(name: str, contestant: Mapping[str, Any]) -> bool:
    """Whether YAN is measured against it at equal compute; plain flow matching, of one expert, is one too."""
    return (contestant["family"] != "yan" or name == "plain") and contestant.get("compute", 1.0) == 1.0


def _share(value: float, quality: Mapping[str, Any]) -> str:
    """A metric in points, with its interval where there is one."""
    low_high = quality["intervals"].get(quality["metric"])
    interval = f" [{100 * low_high[0]:.1f}, {100 * low_high[1]:.1f}]" if low_high else ""
    return f"{100 * value:.1f}{interval}"


def commits(report: Report) -> str:
    """Where figures come from: speeds are of the report's own commit, models may be older, as new reports tell."""
    trained = sorted({short_commit(of["commit"]) for of in report["contestants"].values() if "commit" in of})
    told = [
        *(["models of commit " + ", ".join(trained)] if trained else []),
        f"measured at {short_commit(report['commit'])}",
    ]
    return ", ".join(told)


def short_commit(commit: str) -> str:
    """A commit's first letters, and whether files differed from it."""
    return commit[:12] + "-dirty" * commit.endswith("-dirty")


def heading(report: Report) -> str:
    """What was compared, when and where, by which command."""
    machine = report["machine"]
    where = f"{machine['processor']} ({machine['cores']} cores), float32"
    if machine["device"] != "cpu":
        where = f"{machine['device']}, trained in bfloat16, answers in float32"
    if load := machine.get("load_average"):
        where += f", load average {load:.1f}"
    counts = next(iter(report["contestants"].values()))["quality"][0].get("counts", {})
    cut, length = counts.get("sources_cut"), counts.get("generated_tokens", 0) / report["rows"]
    lines = [
        f"### {report['name']}",
        "",
        f"{report['task']} on {report['data']}, {report['rows']} validation rows"
        f"{f', {cut} with sources cut to fit' if cut else ''}"
        f"{f', answers of {length:.1f} tokens in the mean' if length else ''}; {report['date'][:10]}, "
        f"{commits(report)}, {where}.",
        "",
        *([f"`yan compare {' '.join(report['arguments'])}`", ""] if report.get("arguments") else []),
    ]
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """One report as a table, a line for each contestant and number of steps."""
    metric = next(iter(report["contestants"].values()))["quality"][0]["metric"]
    lines = [
        heading(report),
        f"| model | steps | {metric.replace('_', ' ')} [95 %] | told length | others | passes | ms, alone "
        "| ms per 1,000 tokens, 64 together | parameters | TFLOPs of training | updates |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    if constant := report.get("constant"):
        lines.append(f"| always “{constant['answer']}” | | {100 * constant['value']:.1f} | | | 0 | | | | | |")
    for of in report["contestants"].values():
        for i, quality in enumerate(of["quality"]):
            speed = of["speed"][str(quality["num_steps"])]
            autoregressive = of["family"] in ("ar", "encoder_decoder")
            others = ", ".join(
                f"{name.replace('_', ' ')} {scale(name) * value:.1f}"
                for name, value in quality["metrics"].items()
                if name != metric and not name.endswith("_oracle_length")
            )
            own = (
                f"{of['parameters_without_embeddings'] / 1e6:.2f}M + {_embeddings(of) / 1e6:.2f}M "
                f"| {of['training_flops'] / 1e12:.1f} "
                f"| {' + '.join(str(n) for n in of['training_steps'].values() if n)}"
            )
            lines.append(
                f"| {of['label'] if i == 0 else ''} | {'' if autoregressive else quality['num_steps']} "
                f"| {_share(quality['value'], quality)} | {100 * quality['oracle_value']:.1f} | {others} "
                f"| {speed['nfe']:g} | {speed['latency_ms_p50']:.1f} "
                f"| {_number(speed['ms_per_1000_tokens_batch_64'])} "
                f"| {own if i == 0 else ' | | '} |"
            )
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _embeddings(of: Mapping[str, Any]) -> int:
    return of["parameters"] - of["parameters_without_embeddings"]


def pictures(report: Report) -> dict[str, Figure]:
    """Quality against latency, steps and size, and where they vary experts and what mixes tokens, by file name."""
    from matplotlib.figure import Figure  # a table can do without

    contestants = report["contestants"].values()
    metric = next(iter(contestants))["quality"][0]["metric"].replace("_", " ")
    pareto = Figure(figsize=(9, 4.2), layout="constrained")
    axes = pareto.subplots()
    for i, of in enumerate(contestants):
        points = [(of["speed"][str(q["num_steps"])]["latency_ms_p50"], q["value"]) for q in of["quality"]]
        axes.plot(*zip(*points, strict=True), marker="os^v"[i // 10 % 4], label=of["label"], linewidth=1)
    axes.set(xscale="log", xlabel="milliseconds a request, alone", ylabel=metric, title=report["name"])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    pareto.legend(fontsize=8, loc="outside center right")  # pyright: ignore[reportArgumentType]  # stubs lack it
    axes.grid(alpha=0.3)
    by_steps = Figure(figsize=(7, 4.2), layout="constrained")
    axes = by_steps.subplots()
    for of in contestants:
        if len(of["quality"]) > 1:
            counts = [q["num_steps"] for q in of["quality"]]
            axes.plot(counts, [q["value"] for q in of["quality"]], marker="o", label=of["label"], linewidth=1)
        else:
            axes.axhline(of["quality"][0]["value"], linestyle=":", linewidth=1, label=of["label"], color="gray")
    axes.set(xlabel="steps", ylabel=metric, title=report["name"])
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    by_size = Figure(figsize=(7, 4.2), layout="constrained")
    axes = by_size.subplots()
    for of in contestants:
        axes.plot(of["parameters_without_embeddings"] / 1e6, main_quality(of)["value"], "o", label=of["label"])
    if sizes := _sizes(report):
        points = sorted((of["parameters_without_embeddings"] / 1e6, main_quality(of)["value"]) for of in sizes)
        axes.plot(*zip(*points, strict=True), color="gray", linewidth=1, zorder=0)
    axes.set(xlabel="parameters without embeddings, millions", ylabel=metric, title=report["name"])
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    found = {"quality_by_latency.png": pareto, "quality_by_steps.png": by_steps, "quality_by_size.png": by_size}
    counts = _by_experts(report)
    if any(len(points) > 1 for points in counts.values()):
        found["quality_by_experts.png"] = by_experts = Figure(figsize=(7, 4.2), layout="constrained")
        axes = by_experts.subplots()
        for label, points in counts.items():
            axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=label)
        axes.set(xlabel="experts", ylabel=f"{metric} at {MAIN_STEPS} steps", title=report["name"])
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    if mixers := _mixers(report):
        found["transformer_and_mamba.png"] = figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for of in mixers:
            points = [(of["speed"][str(q["num_steps"])]["latency_ms_p50"], q["value"]) for q in of["quality"]]
            axes.plot(*zip(*points, strict=True), marker="o", label=of["label"])
            for (ms, value), quality in zip(points, of["quality"], strict=True):
                axes.annotate(str(quality["num_steps"]), (ms, value), (0, 5), textcoords="offset points", fontsize=7)
        low, high = axes.get_ylim()
        if high - low < 0.1:  # else rounding looks like a gap
            axes.set_ylim((low + high) / 2 - 0.05, (low + high) / 2 + 0.05)
        axes.set(xlabel="milliseconds a request, alone (numbers: steps)", ylabel=metric, title=report["name"])
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return found


def _differing_in(report: Report, settings: set[str]) -> list[Mapping[str, Any]]:
    """The recipe, and what differs from it in these settings of the model alone."""
    return [
        of
        for name, of in report["contestants"].items()
        if of["family"] == "yan"
        and (name == "yan" or of["settings"].keys() == {"model"})
        and of["settings"].get("model", {}).keys() <= settings
    ]


def _sizes(report: Report) -> list[Mapping[str, Any]]:
    """Contestants of a sweep over the model's size; empty: there is none."""
    found = _differing_in(report, {"d_model", "num_heads", "flow_blocks"})
    return found if len(found) > 2 else []


def _mixers(report: Report) -> list[Mapping[str, Any]]:
    """Contestants that tell attention from Mamba; empty: there are none."""
    found = _differing_in(report, {"mixer", "source_encoder"})
    return found if any("mixer" in of["settings"].get("model", {}) for of in found) else []


def _by_experts(report: Report) -> dict[str, dict[int, float]]:
    """Quality by number of experts: of contestants that differ in nothing else, by what else they have in common."""
    found: dict[str, dict[int, float]] = {}
    for of in report["contestants"].values():
        recipe = report.get("config", {}).get("model", {}) if of is report["contestants"].get("yan") else {}
        count = (recipe | of["settings"].get("model", {})).get("num_experts")
        if of["family"] == "yan" and count is not None:
            others = of["settings"].keys() - {"model"}
            line = of["label"].partition(", ")[2] if others else "our training"  # of "K = 2, the paper's training"
            found.setdefault(line, {})[count] = main_quality(of)["value"]
    return found


def headline(report: Report) -> str:
    """How YAN at three steps stands to the best baseline, in points of the main metric."""
    of_yan = report["contestants"].get("yan")
    baselines = [of for name, of in report["contestants"].items() if is_baseline(name, of)]
    if of_yan is None or not baselines:
        return ""
    ours = main_quality(of_yan)
    best = max(baselines, key=lambda of: main_quality(of)["value"])
    theirs = main_quality(best)
    points = 100 * (ours["value"] - theirs["value"])
    apart = paired_difference(ours["rows"], theirs["rows"])
    interval = f"95 % interval over rows: {100 * apart.low:+.1f} to {100 * apart.high:+.1f}"
    ms_ours, ms_theirs = (
        of["speed"][str(quality["num_steps"])]["latency_ms_p50"] for of, quality in ((of_yan, ours), (best, theirs))
    )
    constant = report.get("constant")
    learnt = (
        ""
        if not constant or theirs["value"] > constant["value"]
        else (
            f"No baseline is better than to answer “{constant['answer']}” always ({100 * constant['value']:.1f}): this "
            "says nothing of how YAN and they compare. "
        )
    )
    return learnt + (
        f"YAN at {ours['num_steps']} steps is {abs(points):.1f} points {'above' if points >= 0 else 'below'} the best "
        f"baseline, {best['label']} ({interval}), and takes {ms_ours / ms_theirs:.2f} times its milliseconds alone.\n"
    )


def differences(report: Report) -> str:
    """What each change to YAN's recipe is worth, where there are some: points of the main metric, and steps."""
    contestants = report["contestants"]
    changed = [of for name, of in contestants.items() if of["family"] == "yan" and name != "yan"]
    if "yan" not in contestants or not changed:
        return ""
    ours = main_quality(contestants["yan"])
    metric = ours["metric"].replace("_", " ")
    counts = [q["num_steps"] for q in contestants["yan"]["quality"]]
    lines = [
        f"What a change to the recipe is worth in {metric} at {ours['num_steps']} steps, in points; the fewest steps "
        "that come within a point of the best at any number of them; and the share of the answers drawn to one source "
        "that are different:",
        "",
        f"| change | points [95 % over rows] | {' | '.join(f'at {n}' for n in counts)} | fewest steps | different "
        "| parameters |",
        f"|---|---:|{'---:|' * len(counts)}---:|---:|---:|",
    ]
    for of in (contestants["yan"], *changed):
        quality = main_quality(of)
        steps = fewest(of["quality"])["num_steps"]
        distinct = quality["metrics"].get("distinct_answers")
        apart = paired_difference(quality["rows"], ours["rows"])
        points = f"{100 * apart.value:+.1f} [{100 * apart.low:+.1f}, {100 * apart.high:+.1f}]"
        first = "none |" if of is contestants["yan"] else f"{of['label']} | {points}"
        values = " | ".join(f"{100 * q['value']:.1f}" for q in of["quality"])
        told = "" if distinct is None else f"{100 * distinct:.0f} %"
        size = f"{of['parameters_without_embeddings'] / 1e6:.2f}M"
        lines.append(f"| {first} | {values} | {steps} | {told} | {size} |")
    return "\n".join(lines) + "\n"


def with_other_seeds(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """The reports without those of other seeds, named `<name>_seed<N>`, which the report of that name has as `seeds`.

    Raises:
        ValueError: If there is no report of that name, or it has another config.
    """
    found = {report["name"]: dict(report) for report in reports}
    for name in [name for name in found if re.fullmatch(r".+_seed\d+", name)]:
        other = found.pop(name)
        first = found.get(name.rpartition("_")[0])
        if first is None or _but_for_the_seed(first) != _but_for_the_seed(other):
            differ = difference(_but_for_the_seed(first), _but_for_the_seed(other)) if first else "there is none"
            raise ValueError(
                f"{name} stands for another seed of {name.rpartition('_')[0]}: there must be a report of that name "
                f"with the same config but for name and seed; {differ}"
            )
        first.setdefault("seeds", []).append(other)
    return list(found.values())


def _but_for_the_seed(report: Report) -> dict[str, Any]:
    """Settings since come by have their defaults."""
    config = to_dict(from_dict(RunConfig, report["config"]))
    return {key: value for key, value in config.items() if key not in ("name", "seed")}


def over_seeds(report: Report) -> str:
    """What each contestant reached with each seed, where some were trained with others too."""
    if not report.get("seeds"):
        return ""
    every = sorted([report, *report["seeds"]], key=lambda of: of["config"]["seed"])
    found = {
        name: [main_quality(of["contestants"][name]) if name in of["contestants"] else None for of in every]
        for name in report["contestants"]
    }
    found = {name: values for name, values in found.items() if sum(value is not None for value in values) > 1}
    shared = [i for i in range(len(every)) if all(values[i] is not None for values in found.values())]
    seeds = [str(of["config"]["seed"]) for of in every]
    lines = [
        f"Trained with several seeds, at {MAIN_STEPS} steps; weights, order and noise of the training follow from the "
        "seed, and of the built-in world the rows. How far apart seeds are tells more of chance than an interval over "
        "rows; less YAN is of each seed that both have. In brackets what a baseline's answers reach that are drawn, as "
        "YAN's are, and not the likeliest, and the share of a row's draws that are different:",
        "",
        f"| model | {' | '.join(f'seed {seed}' for seed in seeds)} | mean of {', '.join(seeds[i] for i in shared)} "
        "| less YAN |",
        f"|---|{'---:|' * len(every)}---:|---:|",
    ]
    for name, values in found.items():
        mean = statistics.mean(quality["value"] for i in shared if (quality := values[i]) is not None)
        cells = " | ".join(map(_of_seed, values))
        pairs = [(a["value"], b["value"]) for a, b in zip(values, found.get("yan", ()), strict=False) if a and b]
        less = ", ".join(f"{100 * (value - ours):+.1f}" for value, ours in pairs) if name != "yan" else ""
        lines.append(f"| {report['contestants'][name]['label']} | {cells} | {100 * mean:.1f} | {less} |")
    return "\n".join(lines) + "\n"


def _of_seed(quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        return ""
    drawn = {f"{quality['metric']}_drawn": "{:.1f}", "distinct_answers": "{:.0f} %"}
    told = [form.format(100 * v) for name, form in drawn.items() if (v := quality["metrics"].get(name)) is not None]
    return f"{100 * quality['value']:.1f}" + (f" ({', '.join(told)})" if told else "")


def shown(report: Report) -> set[str]:
    """Pictures that the page has of a report: those of what was compared in it."""
    of_models = set() if is_of_changes(report) else {"quality_by_latency"}
    return (
        of_models | ({"quality_by_size"} if _sizes(report) else set()) | {"quality_by_experts", "transformer_and_mamba"}
    )


def draw(reports: Sequence[Report], folder: Path) -> dict[str, list[str]]:
    """Draw the page's pictures, the same bytes each time; their files' names by report."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[str]] = {}
    with rc_context({"svg.hashsalt": "yan", "svg.fonttype": "none"}):
        for report in reports:
            for file, figure in pictures(report).items():
                kind = Path(file).stem
                if kind in shown(report):
                    name = f"{report['name']}_{kind}.svg"
                    figure.savefig(folder / name, metadata={"Date": None})
                    found.setdefault(report["name"], []).append(name)
    return found


def page(reports: Sequence[Report], verdict: str = "", drawn: Mapping[str, Sequence[str]] | None = None) -> str:
    """All reports as one page, after what they come to, which a person has written.

    Args:
        reports: In the order of the page.
        verdict: What they come to.
        drawn: Names of each report's pictures, which lie in `pictures/` beside the page.
    """
    drawn = drawn or {}
    parts = [
        "# Results\n",
        "Written by `python -m pipelines.results docs/results/*.json --page docs/RESULTS.md --short README.md` from "
        "what `yan compare` or `pipelines.benchmarks.quality_gpu` measured; no figure of a table is typed by hand. "
        "Every contestant of a table was trained on the same rows with the same tokenizer, for the same number of "
        "floating-point operations (of its matrix products) where its label names no multiple: that is not the same "
        "number of updates, of the autoencoder + flow + fine-tuning, and so of rows seen. "
        "Parameters are those of the layers + those of embeddings, positions and vocabulary head; passes are the "
        "median of requests alone. Every model finds the end of an answer itself; *told length* is what it would "
        "reach if it were told, which gives an answer away where answers differ in length. Intervals are over "
        "validation rows; each model was trained once, with the seed and the settings of the run compared, where no "
        "table of several seeds is. *Always* "
        "is the best single answer to all rows, chosen knowing them: what is not above it has learnt nothing from the "
        "sources. The verdict and what stands below a table were written by hand, in `docs/results/*.md`.\n",
        verdict,
    ]
    for report in reports:
        table = heading(report) if is_of_changes(report) else markdown(report)
        images = [
            f"![{Path(name).stem.replace('_', ' ')}](pictures/{name})\n" for name in drawn.get(report["name"], ())
        ]
        parts += [table, headline(report), differences(report), over_seeds(report), *images, report.get("notes", "")]
    return "\n".join(part for part in parts if part)


def short(reports: Sequence[Report]) -> str:
    """A line for each task and contestant of the usual compute, with the figures that stand for it."""
    lines = ["| task | model | passes | quality [95 %] | ms, alone |", "|---|---|---:|---:|---:|"]
    for report in reports:
        if is_of_changes(report):
            continue
        best: dict[str, Mapping[str, Any]] = {}
        for name, of in report["contestants"].items():
            family = of["family"]
            if name != "yan" and not is_baseline(name, of):
                continue
            kind = "plain" if name == "plain" else family  # of a baseline that was tuned twice, the better one
            if kind not in best or main_quality(of)["value"] > main_quality(best[kind])["value"]:
                best[kind] = of
        for of in best.values():
            quality = main_quality(of)
            speed, metric = of["speed"][str(quality["num_steps"])], quality["metric"].replace("_", " ")
            task = f"{report['name']}, {metric}" if of is next(iter(best.values())) else ""
            lines.append(
                f"| {task} | {of['label']} | {speed['nfe']:g} | {_share(quality['value'], quality)} "
                f"| {speed['latency_ms_p50']:.1f} |"
            )
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- results: written by `make docs` -->\n", "<!-- end of results -->\n"
"""What stands around the short table in a file that holds more."""


def with_short(text: str, reports: Sequence[Report]) -> str:
    """A text whose short table is that of the reports.

    Raises:
        ValueError: If the marks are not there.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the file to write into must have the lines {BEGIN.strip()} and {END.strip()} once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{short(reports)}{END}{rest.split(END)[1]}"


def read_report(file: Path) -> dict[str, Any]:
    """A report, with the notes that lie beside it as `<name>.md`."""
    report = json.loads(file.read_text(encoding="utf-8"))
    notes = file.with_suffix(".md")
    report["name"] = file.stem  # two reports may be of one run
    return report | ({"notes": notes.read_text(encoding="utf-8")} if notes.is_file() else {})


def main(args: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.results", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path, help="report.json of `yan compare`, several")
    parser.add_argument("--page", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--short", type=Path, help="Markdown file with marks, between which a short table goes")
    chosen = parser.parse_args(args)
    reports = with_other_seeds([read_report(file) for file in sorted(chosen.reports)])
    verdict = chosen.reports[0].parent / "verdict.md"
    drawn = draw(reports, chosen.page.parent / "pictures")
    write_file(chosen.page, page(reports, verdict.read_text(encoding="utf-8") if verdict.is_file() else "", drawn))
    if chosen.short:
        write_file(chosen.short, with_short(chosen.short.read_text(encoding="utf-8"), reports))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
