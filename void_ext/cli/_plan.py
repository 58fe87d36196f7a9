"""``void-ext plan``: searches plans, prints what was measured, saves the best plan of each budget."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from void_ext._files import check_output, replacing
from void_ext.cli import _run, _timing
from void_ext.cli._console import Terminal
from void_ext.cli._plan_parser import UNITS
from void_ext.cli._signals import ending_with_exception

if TYPE_CHECKING:
    from torch import nn

    from void_ext.search import Costs, Found, Passage, Settings, Text

STATE = "search.json"
RESULT = "frontier.json"
PICTURE = "frontier.png"


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    if 0 in arguments.budget:
        arguments.parser.error("argument --budget: expected numbers of layers >= 1, such as 2,4")
    if arguments.length < 2:
        arguments.parser.error("argument --length: expected at least 2, a token and the one after it")
    folder = _folder(arguments)
    _refuse_foreign(folder, arguments)
    from void_ext.search import Settings, costs_of, find_plans, passages

    calibration, held_out = _texts(arguments)
    settings = Settings(
        budgets=tuple(arguments.budget),
        kinds=UNITS[arguments.units],
        alpha=arguments.alpha,
        shortlist=arguments.shortlist,
        exchange=not arguments.no_exchange,
        seeds=arguments.seeds,
        protect=tuple(arguments.protect),
        protect_default=not arguments.no_default_protection,
    )
    model, tokenizer = _run.load_model(arguments, terminal)
    _check_length(arguments, model)
    texts = passages(tokenizer, calibration, held_out, sequences=arguments.sequences, length=arguments.length)
    costs = costs_of(model, settings, arguments.sequences)
    state = folder / STATE
    if not arguments.json:
        _announce(terminal, texts, costs, state.exists() and not arguments.force)
    folder.mkdir(exist_ok=True)
    if arguments.force:  # not before all else has proved right
        _remove_earlier(folder)
    try:
        with ending_with_exception(), terminal.waiting() as report:
            found = find_plans(model, texts, settings, state_path=state, progress=report)
    except (KeyboardInterrupt, SystemExit):
        if state.exists():
            without = " without --force" * arguments.force
            terminal.note(f"what was measured is kept in {state}; the same command{without} goes on from there")
        raise
    for kind, budgets in found.not_exchanged.items():
        terminal.note(
            f"no exchange of {kind} with {', '.join(map(str, budgets))} off: an earlier run in {folder} went straight "
            "on there; ask for all budgets at once in another --out to have it tried"
        )
    document = _document(arguments, model, texts, settings, costs, found)
    files = _write(folder, arguments, document, found, texts)
    if arguments.json:
        terminal.document(json.dumps({**document, "files": files}, indent=2, ensure_ascii=not terminal.blocks))
        return 0
    _print(terminal, found, files)
    return 0


def _folder(arguments: argparse.Namespace) -> Path:
    if arguments.out is not None:
        return Path(arguments.out)
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(arguments.model).name).strip("-.") or "model"
    return Path(f"plan-{name}")


def _refuse_foreign(folder: Path, arguments: argparse.Namespace) -> None:
    """Files of an earlier search are gone on from or replaced; a place that cannot be written is refused now."""
    if not folder.exists():
        check_output(folder, what="--out")
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"--out: expected a directory, {str(folder)!r} is a file")
    state = folder / STATE
    check_output(state, what="--out", force=True)
    if not arguments.force and not state.exists():
        for path in _outputs(folder, arguments.budget):
            check_output(path, what="--out")


def _remove_earlier(folder: Path) -> None:
    """Remove what the search of the state file left, by its own record, which goes last; other files are the user's."""
    from void_ext.search.state import budgets_in

    state = folder / STATE
    if state.exists():
        for path in (*_outputs(folder, budgets_in(state)), state):
            path.unlink(missing_ok=True)


def _outputs(folder: Path, budgets: Iterable[int]) -> list[Path]:
    plans = [folder / f"plan-{budget}.json" for budget in sorted(set(budgets))]
    return [*plans, folder / RESULT, folder / PICTURE]


def _texts(arguments: argparse.Namespace) -> tuple[Text, Text | None]:
    from void_ext.search import default_text, read_text

    calibration = default_text() if arguments.text is None else read_text(arguments.text, what="--text")
    held_out = None if arguments.held_out is None else read_text(arguments.held_out, what="--held-out")
    return calibration, held_out


def _check_length(arguments: argparse.Namespace, model: Any) -> None:
    limit = _timing.context(model)
    if limit is not None and arguments.length > limit:
        raise ValueError(f"--length: expected at most the {limit} positions of this model, got {arguments.length}")


def _announce(terminal: Terminal, texts: tuple[Passage, Passage], costs: Costs, resumed: bool) -> None:
    for text in texts:
        count, length = text.ids.shape
        terminal.print(f"{text.role}: {count} sequences of {length} tokens of {text.name} (sha256 {text.sha256[:12]}…)")
    terminal.print(
        f"at most {costs.total:.6g} layer evaluations over a text (rankings {costs.trace}, kept "
        f"streams {costs.dense}, plans {costs.plans:.6g})"
    )
    for kind, cost in costs.searches.items():
        share = cost.greedy / cost.whole_passes
        words = f", exchanges at most {cost.exchange:.6g}" if cost.exchange else ""
        terminal.print(
            f"  greedy, {kind}: at most {cost.greedy:.6g}, {share:.0%} of the {cost.whole_passes:.6g} that whole "
            f"passes for every unit take{words}"
        )
    terminal.print(f"  and final norm and head for at most {costs.measured:.6g} plans")
    if resumed:
        terminal.print("going on from what an earlier run measured")
    terminal.print()


def _document(
    arguments: argparse.Namespace,
    model: nn.Module,
    texts: tuple[Passage, Passage],
    settings: Settings,
    costs: Costs,
    found: Found,
) -> dict[str, Any]:
    import torch
    import transformers

    from void_ext.search.settings import configuration_of
    from void_ext.search.units import named

    return {
        "kind": "plans",
        "model": arguments.model,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "configuration": configuration_of(model, texts, settings),
        "budgets": list(settings.budgets),
        "units": list(settings.kinds),
        "exchange": settings.exchange,
        "costs_at_most": costs.to_dict(),
        "layer_evaluations": found.evaluations,
        "not_exchanged": found.not_exchanged,
        "steps": {
            kind: [
                {"how": step.how, "off": named(step.off), "kl": step.quality.divergence, "damages": step.damages}
                for step in steps
            ]
            for kind, steps in found.steps.items()
        },
        **found.frontier.to_dict(),
    }


def _write(
    folder: Path, arguments: argparse.Namespace, document: dict[str, Any], found: Found, texts: tuple[Passage, Passage]
) -> dict[str, str]:
    """Plans first: they are what was asked for. The state file is this search's, and so are these."""
    from void_ext.search.picture import plot_frontier

    files = {}
    for budget, plan in found.plans.items():
        files[f"plan of {budget}"] = str(plan.save(folder / f"plan-{budget}.json", force=True))
    result = folder / RESULT
    with replacing(result, what="--out", force=True) as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    files["figures"] = str(result)
    count, length = texts[0].ids.shape
    note = f"{count} × {length} tokens each of {texts[0].name} (sha256 {texts[0].sha256[:12]}…)"
    if texts[1].sha256 != texts[0].sha256:
        note += f" and {texts[1].name} (sha256 {texts[1].sha256[:12]}…)"
    title = f"{Path(arguments.model).name}: what leaving layers out costs"
    files["picture"] = str(plot_frontier(found.frontier, folder / PICTURE, title=title, note=note, force=True))
    return files


def _print(terminal: Terminal, found: Found, files: dict[str, str]) -> None:
    from void_ext.search.frontier import with_interval

    for line in found.frontier.lines():
        terminal.document(line)
    terminal.print()
    done = ", ".join(f"{what} {count:.6g}" for what, count in found.evaluations.items()) or "none"
    terminal.print(f"layer evaluations of this run: {done}")
    for budget in found.plans:
        best = found.frontier.best(budget)
        against = found.frontier.against_cosine(best)
        words = f"{budget} layers: {best.method}, held-out perplexity {best.held_out.perplexity:.4g}"
        if against is not None:
            words += f", {with_interval(*against)} of the cosine ranking's"
        terminal.print(words)
    for what, path in files.items():
        terminal.print(f"{what}: {path}")
