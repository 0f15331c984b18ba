"""Multimodal rotary embedding as a choice of axes: every frequency turns with one of a token's three positions.

Hugging Face's modules say the same with slices that are cut and put together (Qwen2-VL) or written over each other
(Qwen3-VL), which becomes a chain of splits, scatters and their index arithmetic in a graph. A choice is one gather.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChosenAxes(nn.Module):
    """cos and sin [1, S, d] for position ids [3, 1, S], equal to those of the Hugging Face module `rotary`.

    Which axis a frequency takes is read off that module's own result for three tokens that have moved along one axis
    each.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        frequencies = rotary.inv_freq.float()
        moved = torch.eye(3, dtype=torch.int64)[:, None]  # [3, 1, S=3]
        _, sin = rotary(torch.zeros(1), moved)
        axes = sin[0, :, : len(frequencies)].abs().argmax(dim=0)
        self.axes, self.frequencies = nn.Buffer(axes, persistent=False), nn.Buffer(frequencies, persistent=False)
        self.scaling = rotary.attention_scaling

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`x` only says of which dtype cos and sin are to be."""
        angles = position_ids.index_select(0, self.axes).permute(1, 2, 0).float() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)
