"""The tables of README and docs, written from the CSV files between `<!-- table: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from _beside_tables import beside_trl, certificates, pairs, steering_shapes, students, trl_trained, trl_tuned
from _chain_tables import delays, hint, hrf, hypernoise
from _exact_tables import (
    EXACT,
    TASKS,
    VALUES_ALONE,
    Plan,
    causal,
    clusters,
    exact,
    measurement,
    off_below,
    own_optima,
    parametrisations,
    q_learning,
    readme,
    samplers,
    steering,
    to_own,
    tokens,
)
from _label_tables import mixture, sizes
from _picture_tables import (
    ABLATIONS,
    DIGITS,
    GRADIENTS,
    digits_end,
    digits_reached,
    glyphs,
    gradients,
    kinds,
    online_rounds,
    shapes,
    shapes_kl,
    shapes_tuned,
)
from _prompt_tables import candidates, control, pendulum, prompt_loop
from _records import RESULTS, ROOT
from _stability_tables import stability, stability_unseen, stability_varied, stability_worst
from _tables import Results, Table, of
from _token_tables import tokens_judged, tokens_long
from _value_tables import adjoints, consistency, estimators_gradient, estimators_spread, estimators_value, soft_q

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)


def plain(results: Results, columns: dict[str, tuple[str, int]], by: str = "algorithm") -> Table:
    """A row a run, these columns with so many decimals."""
    table = Table(by, *columns)
    for run in results.runs:
        table.add([run], run[by], *(of([run], key, digits) for key, digits in columns.values()))
    return table


def _at(task: str, trainers: Sequence[str]) -> Plan:
    return [(task, trainer, steps) for trainer in trainers for steps in (10, 25, 50)]


_over_steps = partial(samplers, steps=(5, 10, 25, 50, 200), first="distance", second="reward")
_plain_digits = partial(digits_end, trainers=())
_classifier = ("classifier, sqdf", "classifier, draft-lv")
_memory = {"10 steps": ("mib_10", 1), "200 steps": ("mib_200", 1), "states and predictions of 190 more steps": ("states", 1)}
_pipelines = {"evaluations": ("model_evaluations", 0), "rows backward": ("model_backward_rows", 0), "seconds": ("seconds", 0),
              "over networks": ("over_networks", 3), "peak GiB": ("peak_gib", 1)}  # fmt: skip
_processes = {"CPU s of one": ("alone", 1), "of each of two": ("each", 1), "efficiency": ("efficiency", 2)}
_counts = {"evaluations needed": ("needed", 0), "done": ("done", 0), "with a graph needed": ("needed_backward", 0),
           "done ": ("done_backward", 0), "all done over needed": ("done_over_needed", 2)}  # fmt: skip
_peptides = {"judged antimicrobial": "antimicrobial", "charge": "net_charge", "moment": "hydrophobic_moment"}
_work = {**_counts, "CPU s": ("cpu_seconds", 1), "over bare": ("cpu_over_bare", 2),
         "without critics": ("without_critics", 2), "MiB": ("mib", 0), "bare ": ("bare_mib", 0)}  # fmt: skip
TABLES: dict[str, tuple[str, Callable[[Results], Table]]] = {
    "readme": ("exact", readme),
    "exact_score_action": ("exact", partial(exact, plan=_at("mixture", EXACT[:1]) + _at("mixture16", EXACT[:1]))),
    "exact_policy_gradients": ("exact", partial(exact, plan=_at("mixture", ("ddpo", "dpok")))),
    "exact_sqdf": ("exact", partial(exact, plan=_at("mixture", EXACT[1:4]))),
    "exact": ("exact", partial(exact, plan=[(task, trainer, 25) for task in TASKS for trainer in EXACT])),
    "exact_values_alone": ("exact", partial(exact, plan=[(task, trainer, 25) for task in TASKS for trainer in VALUES_ALONE])),
    "exact_samplers": ("exact", partial(_over_steps, trainers=["score_action"])),
    "exact_samplers_chain": ("exact", partial(_over_steps, trainers=["ddpo", "dpok"], only=("ddim", 1))),
    "measurement": ("measurement", measurement),
    "stability": ("stability", stability),
    "stability_worst": ("stability", stability_worst),
    "stability_varied": ("stability", stability_varied),
    "stability_unseen": ("stability_unseen", stability_unseen),
    "soft_q_mixture": ("soft_q", partial(soft_q, task="mixture")),
    "soft_q_linear_quadratic": ("soft_q", partial(soft_q, task="linear_quadratic")),
    "parametrisations": ("parametrisations", parametrisations),
    "own_optima": ("parametrisations", own_optima),
    "to_own": ("parametrisations", to_own),
    "parametrisations_pictures": ("parametrisations_pictures", kinds),
    "off_below": ("off_below", off_below),
    "adjoints": ("adjoints", adjoints),
    "steering": ("steering", steering),
    "hint": ("hint", partial(hint, task="modes", queries="1,920", evaluations="40,000")),
    "hint_shapes": ("hint", partial(hint, task="shapes", queries="640", evaluations="18,000")),
    "hypernoise": ("hypernoise", partial(hypernoise, task="mixture", queries="25,600", evaluations="640,000")),
    "hypernoise_digits": ("hypernoise", partial(hypernoise, task="digits", queries="1,280", evaluations="25,600")),
    "steering_shapes": ("steering_shapes", steering_shapes),
    "certificates": ("certificates", certificates),
    "students": ("students", students),
    "pairs": ("pairs", pairs),
    "prompt_loop": ("prompt_loop", prompt_loop),
    "control": ("delay", control),
    "pendulum": ("control", pendulum),
    "pendulum_candidates": ("control", candidates),
    "hrf": ("hrf", partial(hrf, task="mixture")),
    "delays": ("hrf", partial(delays, task="mixture")),
    "hrf_digits": ("hrf", partial(hrf, task="digits")),
    "delays_digits": ("hrf", partial(delays, task="digits")),
    "delays_shapes": ("hrf", partial(delays, task="shapes")),
    "q_learning": ("q_learning", q_learning),
    "digits": ("digits", partial(digits_end, trainers=DIGITS)),
    "digits_13": ("digits", partial(digits_reached, level=13)),
    "digits_14": ("digits", partial(digits_reached, level=14)),
    "digits_samplers": (
        "digits",
        partial(samplers, trainers=DIGITS, steps=(5, 10, 25, 50), first="reward", second="held_out.legibility"),
    ),
    "digits_tune": ("digits_tune", partial(_plain_digits, by="name")),
    "gradients": ("gradients", partial(gradients, trainers=GRADIENTS, betas=(0.03, 0.1, 0.3))),
    "gradients_ablations": ("gradients", partial(gradients, trainers=ABLATIONS, betas=(0.1,))),
    "gradients_classifier": ("gradients", partial(gradients, trainers=_classifier, betas=(0.1,))),
    "gradients_tune": ("gradients_tune", partial(_plain_digits, by="name")),
    "online": ("online", _plain_digits),
    "online_rounds": ("online", online_rounds),
    "estimators_gradient": ("estimators", estimators_gradient),
    "estimators_spread": ("estimators", estimators_spread),
    "estimators_value": ("estimators", estimators_value),
    "consistency": ("consistency", consistency),
    "shapes": ("shapes", shapes),
    "shapes_tune": ("shapes_tune", shapes_tuned),
    "shapes_kl": ("shapes", shapes_kl),
    "glyphs": ("glyphs", glyphs),
    "overhead": ("overhead", partial(plain, by="name", columns={"wall time over network time": ("ratio_median", 3)})),
    "memory": ("memory", partial(plain, columns=_memory)),
    "processes": ("processes", partial(plain, columns=_processes, by="name")),
    "tokens": ("tokens", tokens),
    "tokens_chain64": ("tokens_chain64", tokens_long),
    "tokens_pixels": ("tokens_pixels", partial(tokens_judged, held_out={"legibility": "legibility"})),
    "tokens_peptides": ("tokens_peptides", partial(tokens_judged, held_out=_peptides)),
    "causal": ("causal", causal),
    "ctrl": ("ctrl", sizes),
    "ctrl_mixture": ("ctrl", mixture),
    "clusters": ("clusters", clusters),
    "work": ("work", partial(plain, columns=_work)),
    "peers_work": ("peers_work", beside_trl),
    "peers": ("peers", trl_trained),
    "peers_tune": ("peers_tune", trl_tuned),
    "work_counts": ("work_counts", partial(plain, columns=_counts)),
    "pipelines": ("pipelines", partial(plain, columns=_pipelines)),
}
"""Each table by its name: the benchmark whose files it is from, and what makes it of them."""


def markdown(name: str, folder: Path = RESULTS) -> str:
    """A table by its name, from the files of a folder. KeyError where there is none of that name."""
    benchmark, function = TABLES[name]
    return function(Results.of(folder / f"{benchmark}.csv")).markdown()


def run_names(name: str, folder: Path = RESULTS) -> list[str]:
    """The runs that a table shows."""
    benchmark, function = TABLES[name]
    return [run["name"] for run in function(Results.of(folder / f"{benchmark}.csv")).runs]


def filled(page: str, folder: Path = RESULTS) -> str:
    """The page with its tables as the files of a folder have them."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{markdown(match[2], folder)}\n{match[3]}", page)


def write_pages(*, check: bool) -> int:
    """Brings the tables of all pages up to date, or with `check` only names the pages that are not; how many those are."""
    stale = {
        page: text for page in PAGES if (text := filled(page.read_text(encoding="utf-8"))) != page.read_text(encoding="utf-8")
    }
    for page, text in stale.items():
        print(f"{page.relative_to(ROOT)}: {'is not what the results say' if check else 'written'}")
        if not check:
            page.write_text(text, encoding="utf-8")
    return len(stale)


def print_tables(path: Path, benchmark: str) -> None:
    """The tables of a benchmark from one file of its runs, as far as its runs are there."""
    results = Results.of(path)
    for name, (source, function) in TABLES.items():
        if source == benchmark:
            try:
                table = function(results)
            except (LookupError, StopIteration, ValueError) as error:
                print(f"\n{name}: not all of its runs are there ({error!r})")
            else:
                print(f"\n{name}\n\n{table.markdown()}" if table.runs else f"\n{name}: none of its runs are there")
