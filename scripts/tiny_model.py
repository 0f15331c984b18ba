"""What training needs beside the Hugging Face model: first weights, and a forward pass for many questions at once.

All questions about an image share its prefix (prompt head and vision tokens): the prefix runs once, and every question
sees the prefix and itself, with the positions that it would have alone. This is the same function of the same weights
as one Hugging Face call per question; `evaluate_tiny_llava.py` checks the outcome with plain `generate`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from scenes import GRID, GROUPS
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

HEAD = 4  # "<s>USER: " before the image: <s>, USER, :, space
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))


class Text(NamedTuple):
    """Questions of B images, Q each, padded to L tokens: int64 [B, Q, L]; targets are -100 where no loss is taken."""

    ids: Tensor
    targets: Tensor

    def to(self, device: str) -> Text:
        """The same on another device."""
        return Text(self.ids.to(device), self.targets.to(device))


class DenseHeads(nn.Module):
    """Linear read-outs of the projected vision tokens, one per label group. They serve training alone."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, classes) for name, classes in GROUPS.items()})

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Sum of the groups' cross-entropies and the share of right patches, from [N, D] and int8 [N, groups]."""
        tokens, loss, right = self.norm(tokens), tokens.new_zeros(()), {}
        for column, (name, head) in enumerate(self.heads.items()):
            group = labels[:, column].long()
            rows = (group >= 0).nonzero()[:, 0]
            if name == "kind":  # most patches are background: a quarter of them is enough
                rows = rows[(group > 0) | (torch.rand(len(group), device=group.device) < 0.25)]
            if not len(rows):  # no words in the batch, say; every worker has a gradient for every weight all the same
                loss = loss + 0 * (head.weight.sum() + head.bias.sum())
                continue
            logits, group = head(tokens[rows]).float(), group[rows]
            loss = loss + F.cross_entropy(logits, group)
            right[name] = (logits.argmax(-1) == group).float().mean().item()
        return loss, right


def initial_model(config: LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA whose attention starts by comparing: queries equal keys, so like attends to like, and near to near."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).float()
    depth = config.text_config.num_hidden_layers
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            gain = (2 * depth) ** -0.5 if ("o_proj" in name or "down_proj" in name) else 1.0
            nn.init.normal_(weight, 0, gain * 0.8 * math.prod(weight.shape[1:]) ** -0.5)
    for module in model.modules():
        if hasattr(module, "k_proj"):
            module.k_proj.weight.data.copy_(module.q_proj.weight.data * 1.2)
            module.q_proj.weight.data.mul_(1.2)
    nn.init.normal_(model.model.language_model.embed_tokens.weight, 0, 0.5)
    _look_around(model)
    return model


def _look_around(model: LlavaForConditionalGeneration) -> None:
    """First weights of the tower: every head attends to the patches that lie at one offset, as a convolution would.

    Half of the width holds sines and cosines of row and column, the other half the patch; a shift of a sine and cosine
    is a rotation, so a rotated copy of the position is the query that finds the neighbour.
    """
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    width = tower.embeddings.position_embedding.weight.shape[1]
    speeds = math.pi / 2 / 1.4 ** torch.arange(width // 8)  # radians per patch
    angles = torch.arange(GRID)[:, None] * speeds
    axis = torch.stack((angles.sin(), angles.cos()), 2).flatten(1)  # [24, width / 4]
    waves = torch.cat((axis.repeat_interleave(GRID, 0), axis.repeat(GRID, 1)), 1)
    tower.embeddings.position_embedding.weight.data.zero_()
    tower.embeddings.position_embedding.weight.data[1:, : width // 2] = waves
    tower.embeddings.patch_embedding.weight.data[: width // 2] = 0
    nn.init.normal_(tower.embeddings.class_embedding, 0, 0.3)
    for depth, layer in enumerate(tower.encoder.layers):
        reach, turned = ((1, 0), (1, 1), (2.5, 0), (2.5, 1))[depth % 4]
        attn = layer.self_attn
        size = width // attn.num_heads
        for head in range(attn.num_heads):
            angle = 2 * math.pi * (head + turned / 2) / attn.num_heads
            offset = (reach * math.sin(angle), reach * math.cos(angle))
            _find_offset(attn, slice(head * size, (head + 1) * size), offset, speeds)


def _find_offset(attn: nn.Module, rows: slice, offset: tuple[float, float], speeds: Tensor) -> None:
    """Makes one head compare positions shifted by `offset` (rows, columns)."""
    query, key = attn.q_proj.weight.data[rows], attn.k_proj.weight.data[rows]
    query.normal_(0, 0.02), key.normal_(0, 0.02)
    per_axis = query.shape[0] // 4  # speeds used; two rows each
    for axis, shift in enumerate(offset):
        for index in range(per_axis):
            speed = float(speeds[index + 1])
            row, column = 2 * (axis * per_axis + index), 2 * (axis * len(speeds) + index + 1)
            sine, cosine = math.sin(speed * shift), math.cos(speed * shift)
            key[row, column] = key[row + 1, column + 1] = 1.8
            query[row, column], query[row, column + 1] = 1.8 * cosine, 1.8 * sine
            query[row + 1, column], query[row + 1, column + 1] = -1.8 * sine, 1.8 * cosine
    attn.q_proj.bias.data[rows] = 0
    attn.k_proj.bias.data[rows] = 0


def compile_layers() -> None:
    """Compiles what every layer runs: two to three times as fast on the CPUs we measured."""
    global _layer, _vision_layer
    _layer, _vision_layer = torch.compile(_layer, dynamic=False), torch.compile(_vision_layer, dynamic=False)


def normalized(pixels: Tensor) -> Tensor:
    """uint8 [B, 96, 96, 3] as the image processor gives it: float32 [B, 3, 96, 96]."""
    mean, std = MEAN.to(pixels.device), STD.to(pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of [..., n, d]; written out, since it is faster than the fused one on the CPUs we measured."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return torch.softmax(scores if bias is None else scores + bias, -1) @ v


def vision_tokens(model: LlavaForConditionalGeneration, images: Tensor, windows: int = 1) -> Tensor:
    """Projected vision tokens [B, 576, D] in raster order.

    With windows > 1 attention stays within windows x windows squares: the cheap first phase of training.
    """
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    batch, embed = len(images), tower.embeddings
    patches = embed.patch_embedding(images).flatten(2).transpose(1, 2) + embed.position_embedding.weight[1:]
    x = _to_windows(patches, windows)
    first = (embed.class_embedding + embed.position_embedding.weight[0]).to(x.dtype).expand(len(x), 1, -1)
    x = tower.pre_layrnorm(torch.cat((first, x), 1))
    for layer in tower.encoder.layers[: model.config.vision_feature_layer + 1]:
        x = _vision_layer(layer, x)
    x = _from_windows(x[:, 1:], batch, windows)
    projector = model.model.multi_modal_projector
    return projector.linear_2(projector.act(projector.linear_1(x)))


def _vision_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """One layer of the tower, [B, n, width]."""
    attn, y = layer.self_attn, layer.layer_norm1(x)
    q, k, v = (
        proj(y).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    x = x + attn.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.layer_norm2(x))


def _to_windows(x: Tensor, windows: int) -> Tensor:
    side = GRID // windows
    x = x.unflatten(1, (windows, side, windows, side)).transpose(2, 3)  # [B, w, w, side, side, D]
    return x.flatten(3, 4).flatten(0, 2)


def _from_windows(x: Tensor, batch: int, windows: int) -> Tensor:
    side = GRID // windows
    return x.unflatten(0, (batch, windows, windows)).unflatten(3, (side, side)).transpose(2, 3).flatten(1, 4)


def answer_logits(
    model: LlavaForConditionalGeneration, vision: Tensor, places: Tensor, text: Text, head_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and targets [N] at the answers' tokens.

    vision: [B, n, D], the vision tokens shown; places: int64 [B, n], their positions among the 576 (ascending);
    head_ids: int64 [HEAD + 1], the tokens before the image and the line break after it.
    """
    decoder = model.model.language_model
    batch, shown = places.shape
    embedded = decoder.embed_tokens(head_ids).expand(batch, -1, -1)
    prefix = torch.cat((embedded[:, :HEAD], vision.to(embedded.dtype), embedded[:, HEAD:]), 1)
    total = int(places.max()) + 1 if shown < GRID**2 else GRID**2
    front = torch.arange(HEAD, device=places.device).expand(batch, -1)
    last = places.new_full((batch, 1), HEAD + total)
    prefix_rope = _rope(decoder, torch.cat((front, places + HEAD, last), 1)[:, None])
    length = text.ids.shape[2]
    text_rope = _rope(decoder, (HEAD + total + 1 + torch.arange(length, device=places.device))[None, None, None])
    x = decoder.embed_tokens(text.ids)
    for index, layer in enumerate(decoder.layers):
        prefix, x = _layer(layer, prefix, x, (prefix_rope, text_rope), last=index + 1 == len(decoder.layers))
    wanted = text.targets != -100
    return model.lm_head(decoder.norm(x[wanted])).float(), text.targets[wanted]


def _rope(decoder: nn.Module, positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].float() * decoder.rotary_emb.inv_freq
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return (x * rope[0] + turned * rope[1]).to(x.dtype)


def _layer(layer: nn.Module, prefix: Tensor, x: Tensor, ropes: tuple, *, last: bool) -> tuple[Tensor, Tensor]:
    """One decoder layer for the prefix [B, P, D] and the questions [B, Q, L, D]; the last one skips the prefix."""
    attn, size = layer.self_attn, layer.self_attn.head_dim
    y, t = layer.input_layernorm(prefix), layer.input_layernorm(x)

    def heads(proj: nn.Module, rows: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        out = proj(rows).unflatten(-1, (-1, size)).transpose(-2, -3)  # [..., H, n, d]
        return out if rope is None else _rotate(out, rope)

    pk, pv = heads(attn.k_proj, y, ropes[0]), heads(attn.v_proj, y, None)
    tq, tk, tv = heads(attn.q_proj, t, ropes[1]), heads(attn.k_proj, t, ropes[1]), heads(attn.v_proj, t, None)
    x = x + attn.o_proj(_question_attention(tq, tk, tv, pk, pv))
    x = x + layer.mlp(layer.post_attention_layernorm(x))
    if not last:
        rows = torch.arange(prefix.shape[1], device=x.device)
        bias = torch.zeros(len(rows), len(rows), dtype=pk.dtype, device=x.device)
        bias.masked_fill_(rows[None] > rows[:, None], float("-inf"))
        out = attention(heads(attn.q_proj, y, ropes[0]), pk, pv, bias)
        prefix = prefix + attn.o_proj(out.transpose(1, 2).flatten(2))
        prefix = prefix + layer.mlp(layer.post_attention_layernorm(prefix))
    return prefix, x


def _question_attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """Attention of each question [B, Q, H, L, d] to the prefix [B, H, P, d] and, causally, itself: [B, Q, L, H d]."""
    _, questions, _, length, size = q.shape
    q = q * size**-0.5
    rows = q.transpose(1, 2).flatten(2, 3)  # [B, H, Q L, d]
    to_prefix = (rows @ prefix_k.transpose(-1, -2)).unflatten(2, (questions, length))
    order = torch.arange(length, device=q.device)
    own = (q @ k.transpose(-1, -2)).masked_fill(order[None] > order[:, None], float("-inf"))
    weights = torch.softmax(torch.cat((to_prefix, own.transpose(1, 2)), -1), -1)  # [B, H, Q, L, P + L]
    seen = prefix_k.shape[2]
    out = weights[..., :seen].flatten(2, 3) @ prefix_v
    out = out.unflatten(2, (questions, length)) + weights[..., seen:] @ v.transpose(1, 2)
    return out.permute(0, 2, 3, 1, 4).flatten(3)
