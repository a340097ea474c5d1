"""What the parts of a DRT share during one forward call.

Legend: B batch, P positions, R complete chunks, K retrieved chunks, M model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gca.noise import row_seeds
from models.blocks import EarlierKeys
from models.drt.cache import DRTCache
from models.drt.layout import Layout
from models.drt.part_layout import PartLayout


@dataclass
class Call:
    """One forward call: its layout, what it continues, where noise comes from and what it records.

    Attributes:
        layout: Where text, landmarks and chunks lie.
        cache: What the call continues, and is continued from; None = it keeps nothing.
        generator: Source of the retrieval noise, or seeds of the rows ``[B]``.
        hidden_states: Takes embeddings and block outputs at the text positions, or None.
        retrieval: Takes indices int32 and weights float32 ``[B, R, K]`` of every group, or None.
    """

    layout: Layout
    cache: DRTCache | None = None
    generator: torch.Generator | Tensor | None = None
    hidden_states: list[Tensor] | None = None
    retrieval: list[tuple[Tensor, Tensor]] | None = None

    @property
    def earlier_keys(self) -> EarlierKeys | None:
        """Where the windows of the first positions find what lies before this call."""
        if isinstance(self.layout, PartLayout):
            return self.layout.window
        return None if self.cache is None else self.cache.ring

    def noise_source(self, group: int) -> torch.Generator | Tensor | None:
        """Return where the noise of a retrieval comes from: seeds of rows are mixed with the number of the group."""
        return row_seeds(group, self.generator) if isinstance(self.generator, Tensor) else self.generator

    def record(self, x: Tensor) -> None:
        """Keep the text positions of ``[B, P, M]`` if hidden states are wanted."""
        if self.hidden_states is not None:
            self.hidden_states.append(self.layout.text(x))
