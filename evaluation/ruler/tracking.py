"""Variable tracking: one chain of assignments in noise; which variables hold the value?"""

import itertools
import string

from evaluation.ruler.draft import Draft, Growing, draft_rng
from evaluation.ruler.needles import place
from evaluation.templates import cut, fill, load_templates

NAME_LENGTH = 5


def tracking_draft(name: str, seed: int, index: int) -> Draft:
    """Return an example; every assignment stands before those that use it."""
    templates = load_templates("ruler")
    texts, task = templates["templates"]["vt"], templates["tasks"]["vt"]
    rng = draft_rng(name, seed, index)
    names: list[str] = []
    while len(names) <= task["num_hops"]:
        drawn = "".join(rng.choices(string.ascii_uppercase, k=NAME_LENGTH))
        names += [drawn] if drawn not in names else []
    value = str(rng.randrange(10000, 100000))
    sources = [value, *(f"VAR {variable}" for variable in names)]
    chain = [f"VAR {variable} = {source}" for variable, source in zip(names, sources, strict=False)]
    depths = sorted(rng.random() for _ in chain)
    lines = Growing(itertools.repeat(templates["noise"]))
    before, after = cut(texts["template"])
    fields = {"query": value, "num_v": len(names)}
    return Draft(
        fill(before, fields),
        lambda size: "\n".join(place(lines.first(size), chain, depths)),
        fill(after, fields),
        fill(texts["answer_prefix"], fields),
        names,
        texts["max_new_tokens"],
    )
