"""The layers of the blocks: linear, attention, MLP, squeeze-and-excitation.

timm's layers of these names build `nn.Linear`; these build the `Linear` below, and `Attention` has the released projections.
Shapes: B sequences (images or sentences), L tokens, D width, H heads. `dd` is the device and dtype of the parameters.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import use_fused_attn
from timm.models import register_notrace_module

from tnt_timm import ops


@register_notrace_module  # torch.fx keeps it as one node, like nn.Linear
class Linear(nn.Linear):
    """`nn.Linear`, computed by the fastest library for this CPU (`ops.linear`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in_features) -> (..., out_features)
        return ops.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention. One linear gives q and k and another gives v, as in the released code."""

    fused_attn: torch.jit.Final[bool]

    def __init__(self, dim: int, num_heads: int, qkv_bias=False, attn_drop=0.0, proj_drop=0.0, **dd):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.fused_attn = use_fused_attn()
        self.qk = Linear(dim, dim * 2, bias=qkv_bias, **dd)
        self.v = Linear(dim, dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.attn_drop = float(attn_drop)
        self.proj_drop = float(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, L, D) -> (B, L, D)
        B, L, D = x.shape
        q, k = self.qk(x).reshape(B, L, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        v = self.v(x).reshape(B, L, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, L, D/H)
        attn_drop = self.attn_drop if self.training else 0.0
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=attn_drop)
        else:
            attn = (q @ k.transpose(-2, -1)) * self.head_dim**-0.5
            x = F.dropout(attn.softmax(dim=-1), attn_drop) @ v
        return F.dropout(self.proj(x.transpose(1, 2).reshape(B, L, D)), self.proj_drop, self.training)


class Mlp(nn.Module):
    """Linear, GELU, linear, with dropout after the GELU and the second linear."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, **dd):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.fc2 = Linear(hidden_dim, dim, **dd)
        self.drop = float(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, L, D) -> (B, L, D)
        x = F.dropout(F.gelu(self.fc1(x)), self.drop, self.training)
        return F.dropout(self.fc2(x), self.drop, self.training)


class SqueezeExcite(nn.Module):
    """Channel gate of the SE variants, computed from the mean of all tokens, as in the released code."""

    def __init__(self, dim: int, ratio: float = 0.25, **dd):
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.fc1 = Linear(dim, int(dim * ratio), **dd)
        self.fc2 = Linear(int(dim * ratio), dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 1+N, D) -> (B, 1+N, D)
        gate = F.relu(self.fc1(self.norm(x.mean(dim=1, keepdim=True))))
        return x * torch.tanh(self.fc2(gate))
