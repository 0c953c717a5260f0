"""Who attends to whom: inner attention between the words of a sentence, outer attention between the sentences.

The network computes attention fused, so the weights are never there to be looked at. They are computed again here, from
what went into the layer and the layer's own q and k.

B images, N sentences on a grid, M words per sentence on a grid, P prefix tokens (the class token), H heads. Blocks are counted
from 1; rows and columns from 0.
"""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from tnt_timm.errors import UserError
from tnt_timm.figures.features import check_blocks, depth_of
from tnt_timm.figures.tokens import blocks_of, capture, cell, check_words, sentence_grid, word_grid

KINDS = ("class", "sentence", "word")


class Attended(NamedTuple):
    """The attention of one query in one block, laid out on the grid of what it attends to."""

    block: int
    heads: np.ndarray  # (H, h, w); with what falls on prefix tokens, each head sums to 1
    prefix: np.ndarray  # (H, P)


def attention_weights(layer: nn.Module, tokens: Tensor) -> Tensor:
    """Softmax of q k^T, from a layer's input (B, L, D): (B, H, L, L), rows sum to 1.

    Args:
        layer: attention of a TNT of ours or timm's (linears `qk` and `v`), or of timm's vision transformers (`qkv`).
        tokens: its input, normalised already.

    Raises:
        UserError: another kind of attention.
    """
    B, L, _ = tokens.shape
    if hasattr(layer, "qk"):
        q, k = layer.qk(tokens).reshape(B, L, 2, layer.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    elif hasattr(layer, "qkv") and hasattr(layer, "q_norm") and not hasattr(layer, "rope"):
        q, k, _ = layer.qkv(tokens).reshape(B, L, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = layer.q_norm(q), layer.k_norm(k)
    else:
        raise UserError(f"attention: a layer of kind {type(layer).__name__} is not known here; pass a TNT or a ViT")
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


def outer_attention(model: nn.Module, image: Tensor, blocks: Sequence[int], name: str) -> List[Tensor]:
    """Attention among prefix tokens and sentences in chosen blocks, each (H, P+N, P+N), of one image (1, 3, H, W).

    Raises:
        UserError: the model is no TNT and no vision transformer.
    """
    layers = [_outer_layer(block, name) for block in blocks_of(model, blocks, name)]
    inputs = capture(model, image, name, layers, before=True)
    with torch.inference_mode():
        return [attention_weights(layer, inputs[layer][0])[0] for layer in layers]


def inner_attention(model: nn.Module, image: Tensor, blocks: Sequence[int], name: str) -> List[Tensor]:
    """Attention among the words of each sentence in chosen blocks, each (N, H, M, M), of one image (1, 3, H, W).

    Raises:
        UserError: the model is no TNT, or a block has no inner transformer.
    """
    check_words(model, name)
    chosen = blocks_of(model, blocks, name)
    for number, block in zip(blocks, chosen):
        if not hasattr(block, "attn_in"):
            raise UserError(f"blocks: {number}: this block of {name} has no inner transformer")
    inputs = capture(model, image, name, chosen, before=True)
    with torch.inference_mode():
        return [attention_weights(block.attn_in, block.norm_in(inputs[block][0])) for block in chosen]


def attended(
    model: nn.Module,
    image: Tensor,
    kind: str,
    blocks: Optional[Sequence[int]],
    sentence: Optional[Tuple[int, int]],
    word: Optional[Tuple[int, int]],
    name: str,
) -> List[Attended]:
    """What one query attends to.

    Args:
        model, image, name: the network, (1, 3, H, W) normalised, and what to call the network.
        kind: 'class' (the class token to the sentences), 'sentence' (a sentence to all), 'word' (a word to the words of
            its sentence).
        blocks: None for the first, the middle and the last.
        sentence, word: row and column of the query; None for the middle.

    Raises:
        UserError: no such block, sentence or word, or a model that has none.
    """
    numbers = check_blocks(blocks, depth_of(model), name)
    sentences = sentence_grid(model, image)
    row, column = cell("sentence", sentence, sentences)
    index = row * sentences[1] + column
    if kind == "word":
        all_of_them = inner_attention(model, image, numbers, name)
        grid = word_grid(model)
        row, column = cell("word", word, grid)
        rows = [weights[index, :, row * grid[1] + column] for weights in all_of_them]
        prefix = 0
    else:
        all_of_them = outer_attention(model, image, numbers, name)
        grid, prefix = sentences, all_of_them[0].shape[-1] - sentences[0] * sentences[1]
        if kind == "class" and not prefix:
            raise UserError(f"kind: class: {name} has no class token; pass --kind sentence")
        rows = [weights[:, 0 if kind == "class" else prefix + index] for weights in all_of_them]
    return [
        Attended(number, found[:, prefix:].reshape(-1, *grid).numpy(), found[:, :prefix].numpy())
        for number, found in zip(numbers, rows)
    ]


def _outer_layer(block: nn.Module, name: str) -> nn.Module:
    layer = getattr(block, "attn_out", None) or getattr(block, "attn", None)
    if layer is None:
        raise UserError(f"{name}: has blocks without attention ({type(block).__name__}); pass a TNT or a ViT")
    return layer
