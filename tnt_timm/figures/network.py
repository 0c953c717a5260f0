"""Networks of a figure, and what it reads inside them: feature maps, words, attention weights.

B images, D channels, h x w the grid of sentences (patches), N = h*w sentences, M words per sentence, P prefix tokens (the
class token), H heads. Images are (1, 3, H, W), normalised. Blocks are counted from 1 as in the paper.
"""

import contextlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from pydantic import Field
from timm.models.tnt import TNT as TimmTNT
from torch import Tensor, nn

from tnt_timm.checkpoints.open_model import Opened, open_model
from tnt_timm.errors import ConfigError, UserError, one_line
from tnt_timm.models import TNT, PyramidTNT
from tnt_timm.settings.paths import PathText
from tnt_timm.settings.schema import Group


class Output(Group):
    """Output"""

    output: PathText = Field("", description="picture, .png or .svg; its numbers go to .npz or .csv of the same name")
    dpi: int = Field(200, ge=30, le=1200, description="dots per inch of a PNG")


class NetworkSettings(Output):
    """Networks"""

    pretrained: bool = Field(False, description="use published weights for models given by name (else untrained ones)")
    model: str = Field("", description="name of the model that a file of weights belongs to")
    seed: int = Field(0, ge=0, description="seed of untrained weights and of random choices")


class Network(NamedTuple):
    """A network as the user named it. What it cannot give raises a UserError with that name."""

    given: str
    opened: Opened

    @property
    def model(self) -> nn.Module:
        return self.opened.model.eval()

    @property
    def title(self) -> str:
        """Its name in a picture."""
        name = Path(self.given).name if Path(self.given).exists() else self.given
        name = name if self.opened.name in name else f"{name} ({self.opened.name})"
        return name if self.opened.trained else f"{name}, untrained weights"

    @property
    def unit(self) -> str:
        """What timm numbers: blocks, or stages where the grid gets coarser (ResNet, PVT)."""
        return "block" if len({info["reduction"] for info in self.model.feature_info}) == 1 else "stage"

    def block_numbers(self, asked: Optional[Sequence[int]]) -> List[int]:
        """Return the blocks to show, by default the first, middle and last. Raise ConfigError if one does not exist."""
        depth = len(self.model.feature_info)
        for number in asked or ():
            if number not in range(1, depth + 1):
                raise ConfigError(f"blocks: {number}: {self.given} has {self.unit}s 1 to {depth}")
        return list(asked) if asked else sorted({1, max(1, depth // 2), depth})

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Turn an error of the model, as for an image size that it does not take, into one line with its name."""
        try:
            with torch.inference_mode():
                yield
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(f"{self.given}: {one_line(error)}") from None

    def feature_maps(self, images: Tensor, blocks: Sequence[int]) -> List[np.ndarray]:
        """Return the output of each block on the grid of sentences, (B, D, h, w), before the final norm."""
        if not hasattr(self.model, "forward_intermediates"):
            raise UserError(f"{self.given}: timm cannot return feature maps of this model (no forward_intermediates)")
        indices = sorted({number - 1 for number in blocks})
        with self.named_in_errors():
            found = self.model.forward_intermediates(images, indices, output_fmt="NCHW", intermediates_only=True)
        return [found[indices.index(number - 1)].float().numpy() for number in blocks]

    def head_inputs(self, images: Tensor, batch_size: int = 64) -> np.ndarray:
        """Return what the head reads of images (B, 3, H, W), (B, D): of a TNT, the class token after the final norm."""
        model = self.model
        with self.named_in_errors():
            batches = [model.forward_head(model.forward_features(x), pre_logits=True) for x in images.split(batch_size)]
        return torch.cat(batches).float().numpy()

    def sentence_grid(self, image: Tensor) -> Tuple[int, int]:
        """Return the rows and columns of sentences in an image."""
        self._refuse_pyramid()
        embed = getattr(self.model, "pixel_embed", None) or getattr(self.model, "patch_embed", None)
        if not hasattr(embed, "patch_size"):
            raise UserError(f"{self.given}: has no patches; pass a TNT or a ViT")
        return image.shape[2] // embed.patch_size[0], image.shape[3] // embed.patch_size[1]

    def word_grid(self) -> Tuple[int, int]:
        """Return the rows and columns of words in a sentence."""
        self._refuse_pyramid()
        if not isinstance(self.model, (TNT, TimmTNT)):
            raise UserError(f"{self.given}: has no words; pass a TNT")
        embed = self.model.pixel_embed
        return tuple(embed.pixel_grid if isinstance(self.model, TNT) else embed.new_patch_size)

    def word_maps(self, image: Tensor, blocks: Sequence[int]) -> List[np.ndarray]:
        """Return the words after each block, averaged over channels and laid out in their sentences."""
        (m_h, m_w), (h, w) = self.word_grid(), self.sentence_grid(image)
        words = [output[0].float().mean(dim=-1) for _, output in self._pass(image, self._blocks(blocks))]
        return [x.reshape(h, w, m_h, m_w).permute(0, 2, 1, 3).reshape(h * m_h, w * m_w).numpy() for x in words]

    def outer_attention(self, image: Tensor, blocks: Sequence[int]) -> List[Tensor]:
        """Return the attention among prefix tokens and sentences in each block, (H, P+N, P+N)."""
        layers = [getattr(block, "attn_out", None) or getattr(block, "attn", None) for block in self._blocks(blocks)]
        if None in layers:
            raise UserError(f"{self.given}: has blocks without attention; pass a TNT or a ViT")
        passed = self._pass(image, layers)
        with self.named_in_errors():
            return [attention_weights(layer, inputs[0])[0] for layer, (inputs, _) in zip(layers, passed)]

    def inner_attention(self, image: Tensor, blocks: Sequence[int]) -> List[Tensor]:
        """Return the attention among the words of each sentence in each block, (N, H, M, M)."""
        self.word_grid()
        chosen = self._blocks(blocks)
        for number, block in zip(blocks, chosen):
            if not hasattr(block, "attn_in"):
                raise UserError(f"blocks: {number}: this block of {self.given} has no inner transformer")
        passed = self._pass(image, chosen)
        with self.named_in_errors():
            words = [block.norm_in(inputs[0]) for block, (inputs, _) in zip(chosen, passed)]
            return [attention_weights(block.attn_in, each) for block, each in zip(chosen, words)]

    def _refuse_pyramid(self) -> None:
        if isinstance(self.model, PyramidTNT):
            raise UserError(
                f"{self.given}: this figure does not support PyramidTNT, whose stages differ in their grids; pass a TNT"
            )

    def _blocks(self, numbers: Sequence[int]) -> List[nn.Module]:
        if not isinstance(getattr(self.model, "blocks", None), (nn.ModuleList, nn.Sequential)):
            raise UserError(f"{self.given}: has no transformer blocks; pass a TNT or a ViT")
        return [self.model.blocks[number - 1] for number in numbers]

    def _pass(self, image: Tensor, modules: Sequence[nn.Module]) -> List[Tuple[Any, Any]]:
        """Return what goes into and what comes out of each module when the model sees an image."""
        passed: Dict[nn.Module, Tuple[Any, Any]] = {}
        with contextlib.ExitStack() as hooks, self.named_in_errors():
            for module in modules:
                hook = module.register_forward_hook(lambda module, *values: passed.update({module: values}))
                hooks.enter_context(hook)
            self.model(image)
        return [passed[module] for module in modules]


def attention_weights(layer: nn.Module, tokens: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)), (B, H, L, L), of an attention layer and its normalised input (B, L, D).

    Networks compute attention fused, so the weights are computed again. The layer is one of a TNT, ours or timm's
    (linears `qk` and `v`), or of timm's vision transformers (`qkv`); another one raises a UserError.
    """
    B, L, _ = tokens.shape
    if hasattr(layer, "qk"):
        q, k = layer.qk(tokens).reshape(B, L, 2, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    elif hasattr(layer, "qkv") and hasattr(layer, "q_norm") and not hasattr(layer, "rope"):
        q, k, _ = layer.qkv(tokens).reshape(B, L, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = layer.q_norm(q), layer.k_norm(k)
    else:
        raise UserError(f"attention: layers of kind {type(layer).__name__} are not supported; pass a TNT or a ViT")
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


def open_networks(inputs: Sequence[str], own: NetworkSettings) -> List[Network]:
    """Open networks; `pretrained` and `model` are for those without weights of their own.

    Raise UserError if a network cannot be opened, or if one of these settings concerns none of them.
    """
    if own.pretrained and all(Path(given).exists() for given in inputs):
        raise ConfigError(f"command line: pretrained: {inputs[0]} has weights of its own; leave the setting out")
    if own.model and not any(Path(given).is_file() for given in inputs):
        raise ConfigError(f"command line: model: {own.model}: {inputs[0]} is no file of weights for it")
    size = getattr(own, "img_size", None)
    networks = []
    for given in inputs:
        torch.manual_seed(own.seed)
        name = own.model if Path(given).is_file() else ""
        pretrained = own.pretrained and not Path(given).exists()
        opened = open_model(given, name, {"img_size": size} if size else {}, pretrained, untrained=True)
        networks.append(Network(given, opened))
    return networks
