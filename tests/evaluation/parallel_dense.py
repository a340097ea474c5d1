"""The definition of parallel context on a whole model: one eager forward with an explicit mask and positions."""

import copy

import torch

from patches.parallel_context import positions


def dense_tail(model, prefix, pieces, query, *, keep_tail, mode="ME"):
    """Return (summed NLL, targets, summed entropy) of the last ``keep_tail`` tokens, in float64."""
    model = copy.deepcopy(model).double().eval()
    model.set_attn_implementation("eager")
    tokens = [*prefix, *(token for piece in pieces for token in piece), *query]
    segments = torch.tensor(
        [0] * len(prefix) + [n for n, piece in enumerate(pieces, 1) for _ in piece] + [-1] * len(query)
    )
    placed, after = positions([len(piece) for piece in pieces], mode, len(prefix))
    places = torch.cat([torch.arange(len(prefix)), *placed, after + torch.arange(len(query))])
    row, column = segments[:, None], segments[None]
    visible = (column == 0) | (row == column) | (row == -1)
    visible &= torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -1e30)[None, None]
    with torch.no_grad():
        found = model(
            torch.tensor([tokens]),
            attention_mask=mask,
            position_ids=places[None],
            use_cache=False,
            output_attentions=True,
        )
    rows = slice(len(tokens) - keep_tail - 1, len(tokens) - 1)  # which predict the tail
    targets = torch.tensor(tokens[-keep_tail:])
    nll = torch.nn.functional.cross_entropy(found.logits[0, rows], targets, reduction="sum")
    weights = torch.stack(found.attentions)[:, 0, :, rows]  # [L, H, R, N]
    entropy = torch.special.entr(weights).sum(-1).mean((0, 1)).sum()
    return float(nll), keep_tail, float(entropy)
