"""Weights are found wherever other programs put them, and the log says where."""

import pytest
import torch

from tnt_timm.checkpoints.choose_weights import choose
from tnt_timm.errors import UserError

WANTED = {name: torch.zeros(2, 3) for name in ("stem.weight", "blocks.0.weight", "blocks.1.weight", "head.weight")}
RAW = {name: value + 1 for name, value in WANTED.items()}
EMA = {name: value + 2 for name, value in WANTED.items()}


def under(prefix, weights=RAW):
    return {prefix + name: value for name, value in weights.items()}


def found(state, which="", wanted=WANTED):
    chosen = choose(state, wanted, which, "w.pth")
    return chosen.weights["stem.weight"][0, 0].item(), chosen


@pytest.mark.parametrize(
    "state",
    [
        RAW,
        {"model": RAW},
        {"model_state_dict": RAW},
        {"weights": RAW},
        {"model": {"state_dict": RAW}},
        {"net": {"module": RAW}},
    ]
    + [{"state_dict": under(prefix)} for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")],
)
def test_common_places_need_no_word(state):
    number, chosen = found(state)
    assert number == 1 and chosen.weights.keys() == WANTED.keys() and not chosen.notice


@pytest.mark.parametrize("prefix", "model. net. timm_model. backbone. student. encoder. network.module. a.b.c.".split())
def test_a_common_prefix_is_removed_and_said(prefix):
    number, chosen = found(
        {"state_dict": {**under(prefix), "criterion.weight": torch.ones(1), "acc.total": torch.ones(1)}}
    )
    assert number == 1 and chosen.weights.keys() == WANTED.keys()
    assert f"prefix {prefix} removed" in chosen.notice and "skipped criterion.weight, acc.total" in chosen.notice


def test_compiled_parts_lose_their_prefix():
    number, chosen = found({name.replace("blocks.0", "blocks.0._orig_mod"): value for name, value in RAW.items()})
    assert number == 1 and chosen.weights.keys() == WANTED.keys()


@pytest.mark.parametrize(
    "state",
    [
        {"state_dict": RAW, key: EMA}
        for key in ("state_dict_ema", "ema", "ema_state_dict", "ema_model", "model_averaged")
    ]
    + [
        {"model": RAW, "model_ema": under("module.", EMA)},
        {
            "state_dict": under("model."),
            "callbacks": {"EMACallback{'decay': 0.9}": {"ema_state_dict": under("model.", EMA)}},
        },
        {"state_dict": under("model.", EMA), "current_model_state": under("model.")},
        {"state_dict": {**under("model."), **under("ema_model.module.", EMA)}},
        {"step": torch.ones(1), **under("online_model."), **under("ema_model.", EMA)},
    ],
)
def test_averaged_weights_are_preferred_and_said(state):
    number, chosen = found(state)
    assert number == 2 and chosen.weights.keys() == WANTED.keys() and "averaged weights (EMA) of" in chosen.notice
    assert found(state, "ema")[0] == 2 and found(state, "raw")[0] == 1


def test_our_own_checkpoints_say_which_weights_were_better():
    state = {"weights": "raw", "state_dict": RAW, "state_dict_ema": EMA}
    assert found(state) == (1, (RAW, "")) and found({**state, "weights": "ema"})[0] == 2 and found(state, "ema")[0] == 2


def test_of_several_the_students_are_used_and_others_are_ambiguous():
    number, chosen = found({"state_dict": {**under("teacher.", EMA), **under("student.")}})
    assert number == 1 and "state_dict.student used, not state_dict.teacher" in chosen.notice
    with pytest.raises(UserError, match=r"w.pth: a and b both hold weights"):
        found({**under("a."), **under("b.", EMA)})
    assert found({**under("a."), **under("b.")})[0] == 1  # the same


@pytest.mark.parametrize(
    "state, which, line",
    [
        ({"epoch": 3}, "", "holds no weights"),
        ({"state_dict": RAW}, "ema", "holds no averaged weights"),
        ({"model_ema": EMA}, "raw", "holds averaged weights (EMA) only"),
    ],
)
def test_weights_that_are_not_there(state, which, line):
    with pytest.raises(UserError) as error:
        found(state, which)
    assert line in str(error.value)


def test_weights_that_do_not_fit_are_those_most_alike():
    """So that they can be adapted: another head, other shapes, and a larger network beside them."""
    other = {**under("student."), "student.head.weight": torch.ones(5, 3)}
    larger = {f"teacher.blocks.{number}.weight": torch.ones(7, 7) for number in range(20)}
    number, chosen = found({"state_dict": {**larger, **other}})
    assert number == 1 and len(chosen.weights) == 4 and chosen.weights["head.weight"].shape == (5, 3)
