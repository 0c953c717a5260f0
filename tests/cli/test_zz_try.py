import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("ti", Path(__file__).with_name("test_interruption.py"))
ti = importlib.util.module_from_spec(spec); spec.loader.exec_module(ti)
data, argv, straight = ti.data, ti.argv, ti.straight
@pytest.mark.parametrize("processes", [3,4])
def test_it(start, argv, straight, tmp_path, processes):
    more = ["--model-kwargs", "depth=2", "embed_dim=24", "inner_dim=6", "num_heads_inner=2", "num_heads_outer=3", "--grad-accum-steps", "1"]
    s = straight(processes, *more)
    run = start(argv(*more, "--recovery-interval", 1), processes)
    run.until(lambda: "2/2" in ti.updates_of(run.out))
    run.kill()
    run = start(argv(*more), processes)
    assert run.wait() == 0
    print(run.out)
    ti.assert_same_bits(s, tmp_path/"run")
