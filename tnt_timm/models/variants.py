"""The models that importing this package registers with timm: their names, arguments, preprocessing and published weights.

A variant is a row of a table here. Sizes are the paper's (table 1): depth 12, 16x16 patches of 16 words, MLP ratio 4.
"""

from typing import Any, Dict, Type

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from tnt_timm.models import checkpoints
from tnt_timm.models.distilled import DistilledTNT
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

# The released weights, as timm publishes them. The 384 variants start from them, with their positions resampled.
_WEIGHTS = {
    "tnt_s": "timm/tnt_s_patch16_224.in1k",
    "tnt_b": "timm/tnt_b_patch16_224.in1k",
    "tnt_s_384": "timm/tnt_s_patch16_224.in1k",
    "tnt_b_384": "timm/tnt_b_patch16_224.in1k",
}


def _cfg(name: str) -> Dict[str, Any]:
    size = 384 if name.endswith("_384") else 224
    return dict(
        url="",
        hf_hub_id=_WEIGHTS.get(name),
        num_classes=1000,
        input_size=(3, size, size),
        pool_size=None,
        fixed_input_size=True,
        crop_pct=0.9,
        interpolation="bicubic",
        mean=IMAGENET_INCEPTION_MEAN,
        std=IMAGENET_INCEPTION_STD,
        first_conv="pixel_embed.proj",
        classifier=("head", "head_dist") if name in DISTILLED else "head",
        paper_ids="arXiv:2103.00112",
        paper_name="Transformer in Transformer",
        origin_url="https://github.com/huawei-noah/Efficient-AI-Backbones/tree/master/tnt_pytorch",
        license="apache-2.0",
    )


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k" if name in _WEIGHTS else name: _cfg(name) for name in (*VARIANTS, *DISTILLED)}
)


def _create(network: Type[TNT], name: str, pretrained: bool, **kwargs) -> TNT:
    """Build a variant, and fit the weights that it starts from.

    Raises:
        ValueError: arguments that do not fit together, or weights that are not this network's.
        RuntimeError: published weights that cannot be had.
    """
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    if (overlay.get("file") or overlay.get("state_dict")) and "num_classes" in kwargs:
        overlay.setdefault("num_classes", kwargs["num_classes"])  # a head of that size in the file is kept
    try:
        return build_model_with_cfg(
            network,
            name,
            pretrained,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=checkpoints.pretrained_filter,
            feature_cfg=dict(out_indices=3, feature_cls="getter"),
            **kwargs,
        )
    except OSError as error:
        cfg = kwargs.get("pretrained_cfg")
        source = {"hf_hub_id": _WEIGHTS.get(name), **(cfg if isinstance(cfg, dict) else {}), **overlay}
        if not pretrained or source.get("file") or source["hf_hub_id"] not in _WEIGHTS.values():
            raise
        raise RuntimeError(_how_to_get_weights(name, source["hf_hub_id"], error)) from None


def _how_to_get_weights(name: str, source: str, error: OSError) -> str:
    return (
        f"{name}: the published weights could not be fetched ({type(error).__name__}). Download "
        f"https://huggingface.co/{source}/resolve/main/model.safetensors and pass it: "
        f"timm.create_model({name!r}, pretrained=True, pretrained_cfg_overlay=dict(file='model.safetensors')), "
        f"train.py --pretrained-path model.safetensors, "
        f"or checkpoint_path='model.safetensors' for the same head and image size"
    )


def _register(network: Type[TNT], name: str, arguments: Dict[str, Any]) -> None:
    def create(pretrained: bool = False, **kwargs) -> TNT:
        return _create(network, name, pretrained, **dict(arguments, **kwargs))

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{network.__name__} with {', '.join(f'{key}={value}' for key, value in arguments.items())}."
    globals()[name] = register_model(create)


for _name, _arguments in VARIANTS.items():
    _register(TNT, _name, _arguments)
for _name, _arguments in DISTILLED.items():
    _register(DistilledTNT, _name, _arguments)
