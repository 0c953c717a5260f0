"""DDP on a GPU."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import tnt_timm  # noqa: F401  (registers the models)


@pytest.mark.cuda
@torch.backends.cudnn.flags(enabled=True, deterministic=True)
def test_ddp_under_nccl_gives_the_gradients_of_one_process(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("tnt_ti", img_size=64, depth=2, num_classes=10).cuda()
    images = torch.randn(8, 3, 64, 64, device="cuda")

    def gradients(network):
        with torch.autocast("cuda", torch.bfloat16):
            loss = network(images).float().square().mean()
        loss.backward()
        return [p.grad for p in network.parameters()]

    alone = gradients(copy.deepcopy(model))
    store = f"file://{tmp_path}/store"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        wrapped = gradients(DistributedDataParallel(model, device_ids=[0]))
        answers = [None]
        dist.all_gather_object(answers, "here")
    finally:
        dist.destroy_process_group()
    assert answers == ["here"]
    assert all(torch.equal(a, b) for a, b in zip(alone, wrapped))
