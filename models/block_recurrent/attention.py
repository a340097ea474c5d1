"""Attention of tokens to the positions before them and to state vectors, and the step of the state.

xPos: a query at m and a key at n are rotated like rotary positions and scaled by zeta^(m / base) and zeta^(-n / base)
with zeta_i = (2 i / D + 0.4) / 1.4, so their product decays with m - n. Positions count inside one block and the
block before it, which keeps the powers small at any length.

Legend: B batch, U tokens of a step (at most W), W block width, H heads, G kv heads, D head size, Z state vectors, M
model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.blocks import AttentionProjections, BlockShape
from models.grouped_attention import grouped_attention
from models.rms_norm import RMSNorm, product_input
from models.rotary import rotary_at, rotate
from models.rows import take


@dataclass(frozen=True)
class Step:
    """One step of all layers: the tokens of each row up to the end of its block, or of the call.

    Attributes:
        held: How many of the W columns before the step are real ``[B]``; they are the last ones.
        tail: Which of the W + U columns each row keeps ``[B, W]``; None = the last ones.
        finished: Rows whose block ends with the step ``[B, 1, 1]``; None = no row.
    """

    held: Tensor
    tail: Tensor | None = None
    finished: Tensor | None = None

    def keep(self, columns: Tensor, width: int) -> Tensor:
        """Return the W columns ``[B, W, ...]`` that the next step sees, of ``[B, W + U, ...]``."""
        return columns[:, -width:] if self.tail is None else take(columns, self.tail)


def xpos(x: Tensor, positions: Tensor, *, base: int, sign: int) -> Tensor:
    """Rotate ``[B, P, H, D]`` to ``positions`` [P] and scale it, queries with ``sign`` 1, keys with -1."""
    size, exact = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    positions = positions.to(exact)
    zeta = (torch.arange(0, size, 2, device=x.device, dtype=exact) / size + 0.4) / 1.4
    power = zeta ** (sign * positions[:, None, None] / base)
    cos, sin = rotary_at(positions, size, theta=10000.0)
    return rotate(x, (cos * power, sin * power))


class WindowAttention(AttentionProjections):
    """Tokens attend to the W positions before them and to themselves, with xPos."""

    recurrent = False

    def __init__(self, shape: BlockShape, *, block_width: int, xpos_base: int) -> None:
        super().__init__(shape, num_reads=2 if self.recurrent else 1)
        self.block_width, self.xpos_base = block_width, xpos_base

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor] | None, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Return what tokens ``[B, U, M]`` read, and the keys and values ``[B, W, G, D]`` the next step sees."""
        query, key, value = self.project(x)
        out, key, value = self.read_window(query, key, value, memory, step=step)
        return self.o_proj(out.flatten(-2)), key, value

    def read_window(
        self, query: Tensor, key: Tensor, value: Tensor, memory: tuple[Tensor, Tensor] | None, *, step: Step
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from ``[B, U, H, D]``; return the outputs and what is kept of keys and values."""
        before = self.block_width
        if memory is None:
            shape = (key.shape[0], before, *key.shape[2:])
            memory = (key.new_zeros(shape), value.new_zeros(shape))
        key, value = torch.cat([memory[0], key], dim=1), torch.cat([memory[1], value], dim=1)
        column = torch.arange(key.shape[1], device=query.device)
        distance = column[before:, None] - column
        allowed = (distance >= 0) & (distance <= before) & (column >= before - step.held[:, None, None])
        out = grouped_attention(
            xpos(query, column[before:], base=self.xpos_base, sign=1),
            xpos(key, column, base=self.xpos_base, sign=-1),
            value,
            allowed,
        )
        return out, step.keep(key, before), step.keep(value, before)


class RecurrentAttention(WindowAttention):
    """Tokens also read the state; the state reads itself and the tokens of each complete block.

    ``s' = g z + (1 - g) s`` with ``g = sigmoid(beta)`` per channel and z what the state read, projected.
    """

    recurrent = True

    def __init__(self, shape: BlockShape, *, block_width: int, num_states: int, xpos_base: int) -> None:
        super().__init__(shape, block_width=block_width, xpos_base=xpos_base)
        size, kv_size = shape.hidden_size, shape.num_kv_heads * shape.head_dim
        self.token_state_q_proj = nn.Linear(size, size, bias=False)
        self.state_q_proj = nn.Linear(size, size, bias=False)
        self.state_token_q_proj = nn.Linear(size, size, bias=False)
        self.state_k_proj = nn.Linear(size, kv_size, bias=False)
        self.state_v_proj = nn.Linear(size, kv_size, bias=False)
        self.state_o_proj = nn.Linear(2 * size, size, bias=False)
        self.query_norm = RMSNorm(shape.head_dim, shape.norm_eps)
        self.key_norm = RMSNorm(shape.head_dim, shape.norm_eps)
        self.state_norm = RMSNorm(size, shape.norm_eps)
        # Embeddings, so that they are initialised like every other weight.
        self.initial_state = nn.Embedding(num_states, size)
        self.state_places = nn.Embedding(num_states, size)
        self.beta = nn.Parameter(torch.zeros(size))

    def begin(self, batch_size: int) -> Tensor:
        """Return the initial state ``[B, Z, M]``."""
        return self.initial_state.weight.expand(batch_size, -1, -1)

    def forward(  # type: ignore[override]
        self, x: Tensor, memory: tuple[Tensor, Tensor] | None, step: Step, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what tokens ``[B, U, M]`` read, keys and values as a plain layer, and the state ``[B, Z, M]``."""
        x = product_input(x)
        query, key = self.query_norm(self.heads(self.q_proj, x)), self.key_norm(self.heads(self.k_proj, x))
        near, keys, values = self.read_window(query, key, self.heads(self.v_proj, x), memory, step=step)
        places = product_input(self.state_norm(state + self.state_places.weight))
        state_key = self.key_norm(self.heads(self.state_k_proj, places))
        state_value = self.heads(self.state_v_proj, places)
        query = self.query_norm(self.heads(self.token_state_q_proj, x))
        far = grouped_attention(query, state_key, state_value)
        if step.finished is not None:
            # The W columns kept are the tokens of the block that ends here.
            read = [
                grouped_attention(self.query_norm(self.heads(self.state_q_proj, places)), state_key, state_value),
                grouped_attention(self.query_norm(self.heads(self.state_token_q_proj, places)), keys, values),
            ]
            gate = torch.sigmoid(self.beta)
            moved = gate * self.state_o_proj(torch.cat(read, dim=-2).flatten(-2)) + (1 - gate) * state
            state = torch.where(step.finished, moved.to(state.dtype), state)
        return self.o_proj(torch.cat([near, far], dim=-2).flatten(-2)), keys, values, state
