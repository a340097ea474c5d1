"""The whole model by the definition: one forward over prefix, pieces and query, loops and dense masks inside."""

import contextlib
import copy
from dataclasses import dataclass, field

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from patches.parallel_context import SelectiveAttention, aggregate_scores, positions
from patches.parallel_context.reference import dense_grouped_attention

NAME = "dense_reference_of_tests"


@dataclass
class Reference:
    """What to compute, and what came out: logits of the query rows and per-layer statistics."""

    prefix: list
    pieces: list
    query: list
    mode: str = "ME"
    selection: object = None
    ape: object = None
    calls: list = None
    """Sizes of the forward calls that the query was read in."""
    start: float = None
    """First query position, where it is not the usual one."""
    hidden: object = None
    """Function (layer, query row, kv head) -> context slots that are hidden."""
    num_heads: int = 2
    first_pass: bool = False
    """Collect scores: the rows beyond `shared` are read without selection."""
    shared: object = None
    entropy: list = field(default_factory=list)
    mass: list = field(default_factory=list)
    scores: list = field(default_factory=list)
    keys: list = field(default_factory=list)
    queries: list = field(default_factory=list)
    weights: list = field(default_factory=list)
    """``[H, N, N]`` per layer, where asked for."""

    @property
    def tokens(self):
        return [*self.prefix, *(token for piece in self.pieces for token in piece), *self.query]

    @property
    def segments(self):
        found = [0] * len(self.prefix)
        for number, piece in enumerate(self.pieces, 1):
            found += [number] * len(piece)
        return torch.tensor(found + [-1] * len(self.query))

    def places(self, fractional=False):
        offset = len(self.prefix)
        placed, after = positions([len(p) for p in self.pieces], self.mode, offset, fractional=fractional)
        after = after if self.start is None else self.start
        query = after + torch.arange(len(self.query))
        return torch.cat([torch.arange(offset), *placed, query])


def run_reference(model, reference, fractional=False, whole=False, weights=False):
    """Return the logits ``[T, V]`` of the query rows, or of all; statistics go to the reference."""
    model = copy.deepcopy(model)
    selection = reference.selection
    shared = None
    if selection is not None and selection.two_pass and not reference.first_pass:
        shared = _first_passes(model, reference)
    places = reference.places(fractional)
    for name in ("entropy", "mass", "scores", "keys", "queries"):
        getattr(reference, name).clear()

    def attend(module, query, key, value, mask, scaling, sliding_window=None, softcap=None, **options):
        reference.keys.append(key)
        reference.queries.append(query)
        layer = module.layer_idx
        hidden = _hidden(reference, places, layer, sliding_window)
        scores = reference.shared if reference.first_pass else shared
        given = None if scores is None else scores[min(layer, len(scores) - 1)]
        options = {"scale": scaling, "softcap": softcap}
        if weights:  # the output for values that are the unit vectors
            units = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
            reference.weights.append(_attend(reference, (query, key, units), hidden, given, options)[0])
        return _attend(reference, (query, key, value), hidden, given, options).transpose(1, 2), None

    with _installed(model, attend), torch.no_grad():
        logits = model(torch.tensor([reference.tokens]), position_ids=places[None], use_cache=False).logits
    return logits[0, 0 if whole else len(reference.tokens) - len(reference.query) :]


def _hidden(reference, places, layer, window):
    """Which keys are hidden from which tokens ``[1, N, N]``, future ones included."""
    segments, count = reference.segments, len(reference.tokens)
    slot = torch.arange(count)
    hidden = slot > slot[:, None]
    mine, theirs = segments[:, None], segments[None]
    hidden = hidden | ((mine >= 0) & (theirs != mine) & (theirs != 0))
    if window is not None:
        hidden = hidden | (places[:, None] - places >= window)
    heads = [hidden]
    if reference.hidden is not None:
        first = count - len(reference.query)
        heads = [hidden.clone() for _ in range(reference.num_heads)]
        for head, mask in enumerate(heads):
            for row in range(len(reference.query)):
                mask[first + row, reference.hidden(layer, row, head)] = True
    return torch.stack(heads)


def _attend(reference, tensors, hidden, given, options):
    """The context rows plainly, the query rows under the policy."""
    query, key, value = tensors
    segments, selection = reference.segments, reference.selection
    first = len(reference.tokens) - len(reference.query)
    hidden = hidden.repeat_interleave(query.shape[1] // len(hidden), 0)[None]
    everything = torch.zeros(len(segments), dtype=torch.long)
    context = dense_grouped_attention(query, key, value, everything, hidden=hidden, own=0, **options)[0][:, :, :first]
    tensors, hidden = (query[:, :, first:], key, value), hidden[:, :, first:]
    top = 5 if selection is None else selection.score_top_k
    counter = SelectiveAttention(top_k=99, score_top_k=top)
    scores = dense_grouped_attention(*tensors, segments, hidden=hidden, own=0, selection=counter, **options)[3]
    reference.scores.append(scores[0])
    if selection is not None and given is None and not reference.first_pass:
        given = _by_call(scores[0], reference, selection)
    chosen = 0 if given is None else given.shape[1]
    parts = [(slice(0, chosen), selection, given), (slice(chosen, None), None, None)]
    found = []
    for rows, policy, scores in parts:
        if hidden[:, :, rows].shape[2]:
            scores = None if scores is None else scores[None]
            rest = (tensors[0][:, :, rows], *tensors[1:], segments)
            common = {"ape": reference.ape, "own": 0, "hidden": hidden[:, :, rows], **options}
            found.append(dense_grouped_attention(*rest, selection=policy, scores=scores, **common))
    output, _, entropy, _, mass = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
    reference.entropy.append(entropy[0])
    reference.mass.append(mass[0])
    return torch.cat([context, output], 2).to(query.dtype)


def _first_passes(model, reference):
    """The shared scores of two passes: each call is first read without selection, behind the calls before it."""
    selection, calls = reference.selection, reference.calls or [len(reference.query)]
    raw, shared = [], None
    for number, size in enumerate(calls, 1):
        first = copy.copy(reference)
        first.first_pass, first.shared = True, shared
        first.calls, first.query = calls[:number], reference.query[: sum(calls[:number])]
        first.entropy, first.mass, first.scores, first.keys, first.queries = [], [], [], [], []
        run_reference(model, first)
        raw.append(torch.stack(first.scores)[:, :, -size:])
        shared = _by_call(torch.cat(raw, 2), first, selection)
    return shared


def _by_call(scores, reference, selection):
    """Aggregate ``[..., H, T, K]`` within each forward call, with momentum from call to call; same T."""
    calls = reference.calls or [len(reference.query)]
    parts, first, before = [], 0, None
    for size in calls:
        found = scores[..., first : first + size, :]
        used = aggregate_scores(found, selection.aggregate, selection.aggregate_top_k)
        if before is not None:
            used = selection.momentum * before + (1 - selection.momentum) * used
        before = used.mean(-2, keepdim=True)
        shape = (*used.shape[:-3], scores.shape[-3], size, scores.shape[-1])
        parts.append(used.expand(shape))
        first += size
    return torch.cat(parts, -2)


@contextlib.contextmanager
def _installed(model, function):
    ALL_ATTENTION_FUNCTIONS[NAME] = function
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        del ALL_ATTENTION_FUNCTIONS[NAME]
