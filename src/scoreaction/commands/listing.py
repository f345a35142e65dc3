"""`scoreaction list`: everything that a recipe can name, and the keys of each."""

from __future__ import annotations

from scoreaction.catalog import SHELVES, Kind, files, find, recipes, summary
from scoreaction.errors import UserError, nearest

LISTS = ["algorithms", "rewards", "models", "solvers", "recipes", "settings"]
KINDS: dict[str, Kind] = {folder: kind for kind, folder in SHELVES.items()}

# Nothing here imports torch before a solver's or a setting's turn, so that a list comes at once.


def overview(what: str | None) -> str:
    """A line for everything in a list, or in all of them. UserError for an unknown list."""
    _check(what)
    lines = []
    for shelf in LISTS if what is None else [what]:
        entries = listed(shelf)
        width = max(map(len, entries), default=0)
        lines += [f"{shelf}:"] if what is None else []
        lines += [f"{'  ' if what is None else ''}{name:<{width}}  {line}".rstrip() for name, line in entries.items()]
    return "\n".join(lines)


def details(what: str, name: str) -> str:
    """The keys of a file on a shelf or of the user's, or of a section of the recipe; the text of a recipe."""
    from scoreaction.recipes.recipe import SECTIONS
    from scoreaction.recipes.settings_help import settings_table
    from scoreaction.recipes.traits import traits_of

    _check(what)
    if what in KINDS:
        module = find(KINDS[what], name, key=f"list {what}")
        traits = traits_of(module, key=f"list {what}")
        lines = [f"{name}: {(module.__doc__ or '').partition(chr(10))[0]}", "", settings_table(module.Config)]
        lines += ["", f"Example: {{name: {name}, {str(traits.example)[1:-1]}}}".replace("'", "")] if traits.example else []
        lines += ["", "Defaults for others:"] if traits.defaults else []
        return "\n".join(lines + [f"{section}: {values}" for section, values in traits.defaults.items()])
    if name not in (known := listed(what)):
        raise UserError(f"list {what}: there is no {name!r}; {nearest(name, known)}")
    if what == "settings":
        return settings_table(SECTIONS[name])
    return recipes()[name].read_text(encoding="utf-8").rstrip() if what == "recipes" else f"{name}  {known[name]}"


def _check(what: str | None) -> None:
    if what is not None and what not in LISTS:
        raise UserError(f"list: there is no list of {what!r}; {nearest(what, LISTS)}")


def listed(what: str) -> dict[str, str]:
    """Name and first line of everything in a list."""
    if what == "solvers":
        from scoreaction.diffusion.solvers import SOLVERS

        return {name: solver.summary for name, solver in SOLVERS.items()}
    if what == "recipes":
        first = {name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in recipes().items()}
        return {name: line.removeprefix("#").strip() if line.startswith("#") else "" for name, line in first.items()}
    if what == "settings":
        from scoreaction.recipes.recipe import SECTIONS

        return {name: (config.__doc__ or "").partition("\n")[0] for name, config in SECTIONS.items()}
    return {name: summary(path) for name, path in files(KINDS[what]).items()}
