"""Each private name still does what its function says; whole runs that stand on them are in the other rooms."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from psa_fast.compat.torch import assert_on_device, graph_is_kept, is_fake, set_lambda_steps


def test_a_tensor_without_data_is_known():
    seen = []

    def op(x):
        seen.append(is_fake(x))
        return x + 1

    make_fx(op, tracing_mode="fake")(torch.ones(2))
    op(torch.ones(2))
    op(torch.ones(2, device="meta"))
    assert seen == [True, False, False]


def test_a_backward_knows_whether_its_graph_is_kept():
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(graph_is_kept())
            return 2 * grad

    y = Double.apply(torch.ones((), requires_grad=True))
    y.backward(retain_graph=True)
    y.backward()
    assert seen == [True, False]


def test_a_false_condition_stops_the_device():
    assert_on_device(torch.tensor(True), "right")
    with pytest.raises(RuntimeError, match="wrong count"):
        assert_on_device(torch.tensor(False), "wrong count")


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_schedule_is_where_its_steps_lead(steps):
    def schedule():
        groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (1.0, 0.1)]
        return torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(groups), lambda step: 1 / (1 + step))

    stepped, put = schedule(), schedule()
    for _ in range(steps):
        stepped.optimizer.step()
        stepped.step()
    set_lambda_steps(put, steps)
    for _ in range(2):
        assert put.get_last_lr() == stepped.get_last_lr()
        assert [g["lr"] for g in put.optimizer.param_groups] == [g["lr"] for g in stepped.optimizer.param_groups]
        same = {name: value for name, value in stepped.state_dict().items() if name != "lr_lambdas"}
        assert {name: put.state_dict()[name] for name in same} == same
        for one in (stepped, put):
            one.optimizer.step()
            one.step()
