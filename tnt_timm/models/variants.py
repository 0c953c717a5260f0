"""Register the models with timm: names, arguments, preprocessing and published weights.

Each variant is a row of a table. The sizes of TNT are those of the paper's table 1: depth 12, 16x16 patches of 16 words, MLP
ratio 4. The sizes of PyramidTNT are those of its paper (arXiv 2201.00978) and its official code.
"""

from typing import Any, Dict, Type

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.tnt import _cfg as timms_cfg

from tnt_timm.models import convert_weights
from tnt_timm.models.distilled import DistilledTNT
from tnt_timm.models.pyramid_tnt import PyramidTNT
from tnt_timm.models.timm_api import TimmModel
from tnt_timm.models.tnt import TNT

__all__ = []  # register_model adds the names

_TI = dict(inner_dim=12, num_heads_inner=2, embed_dim=192, num_heads_outer=3)
_S = dict(inner_dim=24, num_heads_inner=4, embed_dim=384, num_heads_outer=6)
_B = dict(inner_dim=40, num_heads_inner=4, embed_dim=640, num_heads_outer=10)

VARIANTS: Dict[str, Dict[str, Any]] = {
    "tnt_ti": _TI,
    "tnt_s": _S,
    "tnt_b": _B,
    # Squeeze-and-excitation on the outer MLP
    "tnt_ti_se": dict(_TI, se=True),
    "tnt_s_se": dict(_S, se=True),
    "tnt_b_se": dict(_B, se=True),
    # Inner transformers in four blocks only (paper, table 7)
    "tnt_s_sparse4": dict(_S, inner_blocks=(1, 4, 8, 12)),
    # For fine-tuning at 384 pixels
    "tnt_s_384": _S,
    "tnt_b_384": _B,
}
DISTILLED: Dict[str, Dict[str, Any]] = {"tnt_ti_distilled": _TI, "tnt_s_distilled": _S, "tnt_b_distilled": _B}
PYRAMIDS: Dict[str, Dict[str, Any]] = {
    "pyramid_tnt_ti": dict(
        embed_dim=80, inner_dim=5, depths=(2, 6, 3, 2), num_heads_inner=1, num_heads_outer=2, img_size=192
    ),
    "pyramid_tnt_s": dict(embed_dim=128, inner_dim=8, depths=(2, 8, 4, 2), num_heads_inner=2, num_heads_outer=4),
    "pyramid_tnt_m": dict(embed_dim=192, inner_dim=12, depths=(2, 8, 6, 2), num_heads_inner=2, num_heads_outer=4),
    "pyramid_tnt_b": dict(embed_dim=256, inner_dim=16, depths=(2, 10, 6, 2), num_heads_inner=2, num_heads_outer=4),
}

# The released weights on the Hugging Face hub, published by timm. The 384 variants start from them, with resampled positions.
_S_WEIGHTS, _B_WEIGHTS = "timm/tnt_s_patch16_224.in1k", "timm/tnt_b_patch16_224.in1k"
_WEIGHTS = {"tnt_s": _S_WEIGHTS, "tnt_b": _B_WEIGHTS, "tnt_s_384": _S_WEIGHTS, "tnt_b_384": _B_WEIGHTS}


def _cfg(name: str) -> Dict[str, Any]:
    size = 384 if name.endswith("_384") else 224
    classifier = ("head", "head_dist") if name in DISTILLED else "head"
    return timms_cfg(hf_hub_id=_WEIGHTS.get(name), input_size=(3, size, size), classifier=classifier)


def _pyramid_cfg(name: str) -> Dict[str, Any]:
    size = PYRAMIDS[name].get("img_size", 256)
    paper = dict(
        paper_ids="arXiv:2201.00978",
        paper_name="PyramidTNT: Improved Transformer-in-Transformer Baselines with Pyramid Architecture",
    )
    pool_size = (size // 64, size // 64)
    return timms_cfg(input_size=(3, size, size), pool_size=pool_size, first_conv="stem.common_conv.0", **paper)


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k" if name in _WEIGHTS else name: _cfg(name) for name in (*VARIANTS, *DISTILLED)}
    | {name: _pyramid_cfg(name) for name in PYRAMIDS}
)


def _create(network: Type[TimmModel], name: str, pretrained: bool, **kwargs) -> TimmModel:
    """Build a variant, and adapt the weights that it starts from.

    Raises:
        ValueError: the arguments do not fit together, or the weights are another network's.
        RuntimeError: the published weights cannot be downloaded.
    """
    feature_cls = kwargs.get("feature_cls") or "getter"
    if getattr(feature_cls, "__name__", feature_cls) not in ("getter", "FeatureGetterNet"):
        # timm's other ways would take the words, which come first in a block's output
        raise ValueError(f"feature_cls {feature_cls!r}: {name} returns feature maps by 'getter' only; leave it out")
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    if (overlay.get("file") or overlay.get("state_dict")) and "num_classes" in kwargs:
        overlay.setdefault("num_classes", kwargs["num_classes"])  # timm then keeps a head of this size
    try:
        return build_model_with_cfg(
            network,
            name,
            pretrained,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=convert_weights.pretrained_filter,
            feature_cfg=dict(out_indices=(0, 1, 2, 3) if network is PyramidTNT else 3, feature_cls="getter"),
            **kwargs,
        )
    except OSError as error:
        cfg = kwargs.get("pretrained_cfg")
        source = {"hf_hub_id": _WEIGHTS.get(name), **(cfg if isinstance(cfg, dict) else {}), **overlay}
        if not pretrained or source.get("file") or source["hf_hub_id"] not in _WEIGHTS.values():
            raise
        raise RuntimeError(
            f"{name}: the published weights could not be fetched ({type(error).__name__}). Download "
            f"https://huggingface.co/{source['hf_hub_id']}/resolve/main/model.safetensors and pass it: "
            f"timm.create_model({name!r}, pretrained=True, pretrained_cfg_overlay=dict(file='model.safetensors')), "
            f"train.py --pretrained-path model.safetensors, "
            f"or checkpoint_path='model.safetensors' for the same head and image size"
        ) from None


def _register(network: Type[TimmModel], name: str, arguments: Dict[str, Any]) -> None:
    def create(pretrained: bool = False, **kwargs) -> TimmModel:
        return _create(network, name, pretrained, **dict(arguments, **kwargs))

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{network.__name__} with {', '.join(f'{key}={value}' for key, value in arguments.items())}."
    globals()[name] = register_model(create)


for _network, _table in ((TNT, VARIANTS), (DistilledTNT, DISTILLED), (PyramidTNT, PYRAMIDS)):
    for _name, _arguments in _table.items():
        _register(_network, _name, _arguments)
