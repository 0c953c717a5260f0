"""Find the weights of a network in a checkpoint of anyone: by their names and shapes, wherever wrappers have put them.

Programs keep weights under many keys (state_dict, model, model_state_dict, ...), give names prefixes (module., model., net.,
...), and keep averaged weights (EMA) under others (state_dict_ema, model_ema, callbacks.EMA.ema_state_dict, ...). Weights are
a table, which is a dict of tensors, and a prefix, so that the names behind the prefix are those of the network.
"""

import re
from collections import Counter
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Set, Tuple

from torch import Tensor

from tnt_timm.errors import UserError

DEPTH = 5  # of dicts in dicts, and of prefixes
AVERAGED = re.compile(r"EMA|(?<![a-z])(ema|swa|avg|averaged?|shadow)(?![a-z])")
RAW_OF_LIGHTNING = "current_model_state"  # beside it, Lightning's callback puts averaged weights into `state_dict`
# Which weights are meant if several fit
USUAL = "state_dict model model_state_dict net network student backbone timm_model".split()


class Chosen(NamedTuple):
    weights: Dict[str, Tensor]  # by the network's names, if they fit
    notice: str  # where they were, and what was skipped; "" if there is nothing to say


class _Found(NamedTuple):
    """Weights that may be the network's."""

    path: Tuple[str, ...]  # keys of the table in the checkpoint
    prefix: str
    table: Mapping[str, Tensor]
    score: Tuple[int, int]  # tensors with the network's names and shapes; tensors whose names begin like its

    @property
    def weights(self) -> Dict[str, Tensor]:
        start = len(self.prefix)
        return {name[start:]: value for name, value in self.table.items() if name.startswith(self.prefix)}

    @property
    def place(self) -> str:
        return ".".join([*self.path, self.prefix.removesuffix(".")]).strip(".")

    @property
    def rank(self) -> int:
        parts = [part for part in self.place.split(".") if part not in ("module", "state_dict", "")]
        return min([USUAL.index(part) for part in parts if part in USUAL], default=0 if not parts else len(USUAL))


def choose(state: Mapping[str, Any], wanted: Mapping[str, Tensor], which: str, place: str) -> Chosen:
    """Return the weights in a checkpoint that fit a network, else those that are most like it.

    Args:
        state: the checkpoint.
        wanted: the network's own state dict.
        which: "ema" (averaged), "raw", or "" for those that training selected, else EMA if there are any.
        place: name of the checkpoint in an error.

    Raises:
        UserError: there are no weights, none of the kind that is asked for, or several that fit.
    """
    found = [found for path, table in tables(state) for found in _in_table(path, table, wanted)]
    if not found:
        raise UserError(f"{place}: holds no weights")
    selected = state.get("weights")
    is_ours = selected in ("ema", "raw")
    which = which or (selected if is_ours else "")
    averaged = [one for one in found if _is_averaged(one, state)]
    if which == "ema" and not averaged:
        raise UserError(f"{place}: holds no averaged weights (EMA); leave --use-ema out")
    if which == "raw" and len(averaged) == len(found):
        raise UserError(f"{place}: holds averaged weights (EMA) only; leave --no-use-ema out")
    if which:
        found = [one for one in found if (one in averaged) == (which == "ema")]
    best = max(one.score for one in found)
    found = [one for one in found if one.score == best]
    found = [one for one in found if one in averaged] or found
    found.sort(key=lambda one: one.rank)
    chosen, *others = found
    if others and others[0].rank == chosen.rank and not _same(chosen, others[0]):
        raise UserError(
            f"{place}: {chosen.place} and {others[0].place} both hold weights of this network; "
            "save those that you mean in a file of their own"
        )
    return Chosen(chosen.weights, "" if is_ours else _notice(chosen, others, chosen in averaged))


def tables(
    value: Mapping[str, Any], path: Tuple[str, ...] = (), seen: Optional[Set[int]] = None
) -> Iterator[Tuple[Tuple[str, ...], Dict[str, Tensor]]]:
    """Yield the dicts that contain tensors by name, and where they are."""
    seen = set() if seen is None else seen
    if id(value) in seen or len(path) > DEPTH:
        return
    seen.add(id(value))
    # torch.compile adds its prefix to any part that it wraps
    table = {
        name.replace("_orig_mod.", ""): item
        for name, item in value.items()
        if isinstance(name, str) and isinstance(item, Tensor)
    }
    if table:
        yield path, table
    for key, item in value.items():
        if isinstance(key, str) and isinstance(item, Mapping):
            yield from tables(item, (*path, key), seen)


def _in_table(path: Tuple[str, ...], table: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> List[_Found]:
    """Return the weights of a table: one for each prefix behind which names begin like the network's, else all of it."""
    tops = {name.partition(".")[0] for name in wanted}
    fitting, alike = Counter(), Counter()
    for name, value in table.items():
        parts = name.split(".")
        for depth in range(min(DEPTH, len(parts))):
            prefix = "".join(f"{part}." for part in parts[:depth])
            if parts[depth] in tops:
                alike[prefix] += 1
                behind = name[len(prefix) :]
                fitting[prefix] += behind in wanted and wanted[behind].shape == value.shape
    return [_Found(path, prefix, table, (fitting[prefix], alike[prefix])) for prefix in alike or [""]]


def _is_averaged(one: _Found, state: Mapping[str, Any]) -> bool:
    if RAW_OF_LIGHTNING in state:
        return one.path[:1] == ("state_dict",)
    return bool(AVERAGED.search(one.place))


def _same(one: _Found, other: _Found) -> bool:
    """Return whether two are the same weights."""
    a, b = one.weights, other.weights
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape and a[name].equal(b[name]) for name in a)


def _notice(chosen: _Found, others: List[_Found], is_averaged: bool) -> str:
    lines = [f"averaged weights (EMA) of {chosen.place} selected"] if is_averaged and chosen.place else []
    if chosen.prefix not in ("", "module."):
        lines.append(f"prefix {chosen.prefix} removed from the names of {len(chosen.weights)} tensors")
    skipped = [name for name in chosen.table if not name.startswith(chosen.prefix)]
    if skipped:
        more = f" and {len(skipped) - 3} more tensors" if len(skipped) > 3 else ""
        lines.append(f"skipped {', '.join(skipped[:3])}{more}")
    if others and not is_averaged:
        lines.append(
            f"{chosen.place or 'the first weights'} used, not {', '.join(other.place for other in others[:3])}"
        )
    return "; ".join(lines)
