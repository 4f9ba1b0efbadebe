"""Is the first module that makes NaN or infinity named?"""

import torch
from torch import nn

from backbones.training.nonfinite import first_nonfinite, first_nonfinite_module


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.log = nn.Sequential(nn.ReLU(), nn.LogSigmoid())
        self.last = nn.Linear(2, 2)

    def forward(self, x):
        x = {"x": self.first(x)}
        return self.last(self.log(x["x"])), [x]


def test_innermost_module_is_named():
    model = Nested()
    with torch.no_grad():
        model.last.weight[0, 0] = float("inf")
    assert first_nonfinite_module(model, lambda: model(torch.ones(1, 2))) == "last"
    with torch.no_grad():
        model.first.bias[0] = float("nan")
    assert first_nonfinite_module(model, lambda: model(torch.ones(1, 2))) == "first"


def test_a_bad_input_is_told_from_a_bad_module():
    model = Nested()
    assert first_nonfinite_module(model, lambda: model(torch.tensor([[float("nan"), 0]]))) == "the input of the model"


def test_nothing_is_named_when_all_is_finite_and_no_hook_stays():
    model = Nested()
    assert first_nonfinite_module(model, lambda: model(torch.ones(1, 2))) is None
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_an_exception_in_the_pass_keeps_what_was_found():
    model = Nested()
    with torch.no_grad():
        model.first.weight.fill_(float("nan"))

    def run():
        model(torch.ones(1, 2))
        raise FloatingPointError

    assert first_nonfinite_module(model, run) == "first"


def test_first_bad_gradient_is_named():
    pairs = [
        ("a", torch.ones(2)),
        ("b", None),
        ("c", torch.tensor([1, float("inf")])),
        ("d", torch.tensor(float("nan"))),
    ]
    assert first_nonfinite(pairs) == "c"
    assert first_nonfinite(pairs[:2]) is None
