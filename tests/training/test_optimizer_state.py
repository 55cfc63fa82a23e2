"""The optimizer's state by name: what one number of ranks wrote, another goes on with, under every ZeRO stage.

The oracle is torch's AdamW on the whole batch in one process, never interrupted. Sizes are odd, so that shards are
padded and one rank may hold nothing of a parameter.
"""

import json
import sys

import pytest
import torch
from builders import tiny
from safetensors.torch import load_file

WORKER = """
import json, sys
from pathlib import Path
sys.path[:0] = ["tests", "tests/training"]
import deepspeed, torch
import torch.distributed as dist
from psa_fast.training import optimizer_state
from psa_fast.training.engine import init_distributed
from test_optimizer_state import data, make, save_parameters

rank, world = init_distributed()
out = Path(sys.argv[1])
# a file for nearly every parameter, so that the ranks take turns
optimizer_state.FILE_BYTES = 100

def engine_of(zero, bf16):
    model, groups = make()
    config = {
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": 4 // world, "bf16": {"enabled": bf16},
        "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.5,
    }
    if bf16:
        model.bfloat16()
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    return deepspeed.initialize(
        model=model, model_parameters=[p for g in groups for p in g["params"]], optimizer=optimizer, config=config
    )[0]

def step(engine, i, bf16):
    x, y = (t[rank * 4 // world : (rank + 1) * 4 // world] for t in data(i))
    loss = (engine(x.bfloat16() if bf16 else x).float() - y).square().mean()
    engine.backward(loss)
    engine.step()

for name, zero, bf16, start, stop, save in json.loads(sys.argv[2]):
    engine = engine_of(zero, bf16)
    if start:
        source = out / name / f"state-{start}"
        model = torch.load(out / name / f"model-{start}.pt")  # as resuming takes the model from the add-on
        with torch.no_grad(), deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
            for key, parameter in engine.module.named_parameters():
                if parameter.numel():
                    parameter.copy_(model[key])
        optimizer_state.restore(engine, sorted(source.glob("*.safetensors")))
    for i in range(start, stop):
        step(engine, i, bf16)
    folder = out / name / save
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    assert optimizer_state.save(engine, folder) is None
    save_parameters(engine, out / name / save.replace("state", "model"), rank)
    dist.barrier()
    engine.destroy()
dist.destroy_process_group()
"""


def make():
    """Three trained parameters of odd sizes and a frozen one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1), torch.nn.Linear(1, 1))
    model[3].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1]
    others = [p for p in trained if p.dim() == 1]
    return model, [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def data(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)


def save_parameters(engine, path, rank):
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        if rank == 0:
            torch.save({name: p.detach().clone() for name, p in parameters.items()}, f"{path}.pt")


def expected(steps):
    """torch alone: parameters and Adam's state after so many steps."""
    model, groups = make()
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for i in range(steps):
        x, y = data(i)
        (model(x) - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state = optimizer.state[p]
            found |= {f"{name}.weight": p.detach(), f"{name}.step": state["step"].long()}
            found |= {f"{name}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return found


def work(out, ranks, jobs):
    codes, output = tiny.outcome(tiny.start([sys.executable, "-c", WORKER, str(out), json.dumps(jobs)], ranks))
    assert codes == [0] * ranks, output[-3000:]


def state(folder):
    found = {}
    for file in folder.glob("optimizer-*.safetensors"):
        found |= load_file(file)
    return found


KINDS = {
    "zero0": ({"stage": 0}, False),
    "zero1": ({"stage": 1}, False),
    "zero2": ({"stage": 2}, False),
    "zero2-offload": ({"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}, False),
    "zero3": ({"stage": 3, "stage3_param_persistence_threshold": 0}, False),
    "zero3-persistent": ({"stage": 3, "sub_group_size": 10}, False),
    "zero3-offload": (
        {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, False
    ),
    "bf16-zero0": ({"stage": 0}, True),
    "bf16-zero1": ({"stage": 1}, True),
    "bf16-zero2": ({"stage": 2}, True),
    "bf16-zero3": ({"stage": 3}, True),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each kind: six steps on two ranks, whole and with a stop after three on the other number of ranks, and back."""
    out = tmp_path_factory.mktemp("states")
    kinds = [(name, *kind) for name, kind in KINDS.items()]
    work(out, 1, [[*kind, 0, 3, "state-3"] for kind in kinds])
    work(
        out, 2,
        [[*kind, 3, 6, "state-6"] for kind in kinds] + [[*kind, 0, 6, "whole"] for kind in kinds]
        # the same number of ranks: stopped after four
        + [[*kind, 0, 4, "state-4"] for kind in kinds] + [[*kind, 4, 6, "same"] for kind in kinds],
    )  # fmt: skip
    work(out, 1, [[*kind, 6, 8, "state-8"] for kind in kinds])
    return out


@pytest.mark.parametrize("kind", [name for name in KINDS if not name.startswith("bf16")])
def test_one_rank_then_two_then_one_go_where_torch_goes_alone(made, kind):
    for steps in (3, 6, 8):
        found, right = state(made / kind / f"state-{steps}"), expected(steps)
        assert found.keys() == right.keys()
        for name, tensor in right.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_number_of_ranks_continues_to_the_bit(made, kind):
    whole, resumed = state(made / kind / "whole"), state(made / kind / "same")
    assert whole.keys() == resumed.keys() == expected(1).keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), resumed[name].view(-1).view(torch.uint8)), name
    models = [torch.load(made / kind / f"{name}.pt") for name in ("whole", "same")]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


@pytest.mark.parametrize("kind", [name for name in KINDS if name.startswith("bf16")])
def test_master_weights_keep_what_bf16_would_round_away(made, kind):
    found = state(made / kind / "state-3")
    models = torch.load(made / kind / "model-3.pt")
    for name, tensor in models.items():
        if f"{name}.weight" in found:
            master = found[f"{name}.weight"]
            assert master.dtype == torch.float32
            assert torch.equal(master.bfloat16(), tensor)
    assert any(not torch.equal(t, t.bfloat16().float()) for name, t in found.items() if name.endswith(".weight"))
    # bf16's rounding of gradients apart, the other number of ranks goes the same way
    one, other = state(made / kind / "state-6"), state(made / kind / "whole")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0.1, atol=2e-2, msg=lambda m, n=name: f"{n}: {m}")


def test_files_hold_a_parameter_once_and_do_not_depend_on_the_ranks(made):
    """`state-6` was written by two ranks, `state-8` by one."""
    for kind in KINDS:
        by_two, by_one = (
            {f.name: set(load_file(f)) for f in (made / kind / s).iterdir()} for s in ("state-6", "state-8")
        )
        assert by_two == by_one
        assert len(by_two) > 2
        assert sum(map(len, by_two.values())) == len(expected(1))


def test_the_state_of_an_unknown_optimizer_is_refused_before_any_step():
    from types import SimpleNamespace

    from psa_fast.training.optimizer_state import check_engine

    class Lion:
        pass

    with pytest.raises(ValueError, match="the state of DeepSpeed's Lion cannot be saved"):
        check_engine(SimpleNamespace(optimizer=Lion(), module=torch.nn.Linear(1, 1)))
