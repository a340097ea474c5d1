"""The block-recurrent transformer against a loop over tokens and states, its causality, reach and training."""

import pytest
import torch
from model_cases import block_recurrent_config, small_block_recurrent, token_ids
from torch.nn import functional as F

from models.block_recurrent import BlockRecurrentConfig, BlockRecurrentForCausalLM


def _norm(x, norm):
    return norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()


def _heads(projection, x, head_dim):
    return (x @ projection.weight.T).unflatten(-1, (-1, head_dim))


def _read(query, keys, values, scores=lambda scores: scores):
    """One query ``[H, D]`` over ``[L, G, D]``."""
    share = query.shape[0] // keys.shape[1]
    out = []
    for head, q in enumerate(query):
        weights = torch.softmax(scores(keys[:, head // share] @ q * q.shape[0] ** -0.5), dim=0)
        out.append(weights @ values[:, head // share])
    return torch.cat(out)


def _xpos(x, place, base, sign):
    """Rotate and scale ``[H, D]`` pair by pair, as complex numbers."""
    size = x.shape[-1]
    pair = torch.arange(size // 2, dtype=x.dtype)
    turn = torch.polar(((2 * pair / size + 0.4) / 1.4) ** (sign * place / base), place * 10000.0 ** (-2 * pair / size))
    moved = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
    return torch.cat([moved.real, moved.imag], dim=-1)


def _layer(layer, x, config):
    """Map ``[T, M]``, token by token."""
    attn, dim, width = layer.self_attn, config.head_dim, config.block_width
    normed = _norm(x, layer.input_layernorm)
    queries, keys, values = (_heads(p, normed, dim) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    if attn.recurrent:
        queries, keys = _norm(queries, attn.query_norm), _norm(keys, attn.key_norm)
        state = attn.initial_state.weight
    rows = []
    for t in range(len(x)):
        near = range(max(0, t - width), t + 1)
        turned = torch.stack([_xpos(keys[j], j - t, config.xpos_scale_base, -1) for j in near])
        read = [_read(queries[t], turned, values[near.start : t + 1])]
        if attn.recurrent:
            places = _norm(state + attn.state_places.weight, attn.state_norm)
            state_keys = _norm(_heads(attn.state_k_proj, places, dim), attn.key_norm)
            state_values = _heads(attn.state_v_proj, places, dim)
            asked = _norm(_heads(attn.token_state_q_proj, normed[t], dim), attn.query_norm)
            read.append(_read(asked, state_keys, state_values))
            if t % width == width - 1:
                block = slice(t + 1 - width, t + 1)
                own = _norm(_heads(attn.state_q_proj, places, dim), attn.query_norm)
                tokens = _norm(_heads(attn.state_token_q_proj, places, dim), attn.query_norm)
                z = torch.stack(
                    [
                        torch.cat([_read(a, state_keys, state_values), _read(b, keys[block], values[block])])
                        for a, b in zip(own, tokens, strict=True)
                    ]
                )
                gate = torch.sigmoid(attn.beta)
                state = gate * (z @ attn.state_o_proj.weight.T) + (1 - gate) * state
        rows.append(torch.cat(read) @ attn.o_proj.weight.T)
    x = x + torch.stack(rows)
    normed, mlp = _norm(x, layer.post_attention_layernorm), layer.mlp
    inner = F.gelu(normed @ mlp.gate_proj.weight.T) * (normed @ mlp.up_proj.weight.T)
    return x + inner @ mlp.down_proj.weight.T


@pytest.mark.parametrize("changes", [{}, {"recurrent_layers": [1, 3], "num_key_value_heads": 2, "block_width": 4}])
def test_logits_and_gradients_equal_a_loop_over_tokens(changes):
    model = small_block_recurrent(xpos_scale_base=5, **changes).double()
    with torch.no_grad():
        for layer in model.model.layers:
            if layer.self_attn.recurrent:
                layer.self_attn.beta.normal_()
    ids, gradients, losses = token_ids(1, 21), [], []
    for by_hand in (True, False):
        model.zero_grad()
        if by_hand:
            x = model.model.embed_tokens.weight[ids[0]]
            for layer in model.model.layers:
                x = _layer(layer, x, model.config)
            logits = (_norm(x, model.model.norm) @ model.lm_head.weight.T)[None]
            expected = logits.detach()
            loss = F.cross_entropy(logits[0, :-1], ids[0, 1:])
        else:
            output = model(ids, labels=ids)
            torch.testing.assert_close(output.logits, expected, atol=1e-10, rtol=0)
            loss = output.loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)  # the model's loss is float32
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name


@torch.no_grad()
def test_an_edit_beyond_all_windows_arrives_through_the_state():
    # Three layers see 18 tokens back; the plain model of the same windows sees nothing beyond.
    ids = token_ids(1, 60)
    edited = ids.clone()
    edited[0, 3] += 1
    moved = {}
    for layers in ([2], []):
        model = small_block_recurrent(recurrent_layers=layers)
        difference = (model(edited).logits - model(ids).logits).abs().amax(-1)[0]
        assert difference[:3].max() <= 5e-6
        moved[bool(layers)] = difference[3 + 3 * 6 + 1 :]
    assert moved[True].max() > 1e-3 and moved[False].max() <= 5e-6


def test_gradients_stop_between_segments_in_training_only():
    model, ids = small_block_recurrent(segment_blocks=2), token_ids(1, 30)
    reach = {}
    for training in (True, False):
        model.train(training)
        seen = []
        hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        logits = model(ids, use_cache=False).logits
        hook.remove()
        gradient = torch.autograd.grad(logits[0, 13].sum(), seen[0])[0].abs().sum(-1)[0]
        reach[training] = gradient.nonzero().flatten().tolist()
    # Token 13 lies in block 2, the first of the second segment.
    assert reach[True] == [12, 13]
    assert reach[False][0] == 0 and reach[False][-1] == 13


def test_memory_is_dropped_in_training_only():
    model = BlockRecurrentForCausalLM(block_recurrent_config(memory_dropout=0.5, block_width=4)).train()
    ids = token_ids(1, 32).expand(8, -1)
    torch.manual_seed(0)
    first = model(ids).logits
    torch.manual_seed(0)
    assert torch.equal(model(ids).logits, first)
    # Before the second segment all rows agree, later they differ by what was dropped.
    torch.testing.assert_close(first[:, :8], first[:1, :8].expand(8, -1, -1))
    assert (first - first[:1]).abs().amax((1, 2)).gt(1e-4).any()
    alone = model(ids[:1, 8:16]).logits
    same = (first[:, 8:16] - alone).abs().amax((1, 2)) < 1e-5
    assert 0 < same.sum() < 8
    model.eval()
    torch.testing.assert_close(model(ids, use_cache=False).logits[0], model(ids[:1], use_cache=False).logits[0])


def test_config_errors_and_published_fields():
    for changes, message in [
        ({"recurrent_layers": [4]}, "recurrent_layers must be"),
        ({"recurrent_layers": [1, 1]}, "recurrent_layers must be"),
        ({"block_width": 0}, "block_width must be"),
        ({"memory_dropout": 1.0}, "memory_dropout must lie"),
        ({"hidden_size": 12}, "even"),
    ]:
        with pytest.raises(ValueError, match=message):
            block_recurrent_config(**changes)
    config = BlockRecurrentConfig()
    assert (config.num_state_vectors, config.num_key_value_heads, config.recurrent_layers) == (512, 1, [4])
    mapping = {"vocab_size": 200, "pad_id": 198, "bos_id": 197, "decoder_layers": [2, 3], "slide_window": 64}
    config = BlockRecurrentConfig.from_reference_config({**mapping, "num_key_value_heads": 12})
    assert (config.num_hidden_layers, config.block_width, config.num_key_value_heads) == (5, 64, 1)
