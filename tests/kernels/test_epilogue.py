"""The table of activations: forward against the formula, backward against autograd in float64."""

import pytest
import torch

from fqcompile.errors import OptionError
from fqcompile.kernels.epilogue import ACTIVATIONS, Epilogue, activation
from tests.kernels.test_op import exact_activation, exact_up

Z = torch.cat([torch.linspace(-9, 9, 181), torch.tensor([-100.0, 100.0, -1e-30, 1e-30])])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forward_is_the_formula(name: str) -> None:
    want = exact_activation(name, Z.double())
    # Elementary functions in fp32 are good to a few units of their result. gelu multiplies z, here
    # at most 9 where it is not saturated, with 1 + erf, whose tail is lost below units of one.
    torch.testing.assert_close(
        ACTIVATIONS[name].forward(Z), want.float(), rtol=2**-20, atol=9 * 2**-22
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_backward_is_autograd_of_the_formula(name: str) -> None:
    z = Z.double().requires_grad_()
    dy = torch.randn(len(Z), generator=torch.Generator().manual_seed(0)).double()
    exact_activation(name, z).backward(dy)
    got = ACTIVATIONS[name].backward(dy.float(), Z)
    torch.testing.assert_close(got, z.grad.float(), rtol=2**-18, atol=2**-18)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_up_and_its_backward_are_the_formula(name: str) -> None:
    z = Z.double().requires_grad_()
    dy = torch.randn(len(Z), generator=torch.Generator().manual_seed(0)).double()
    want = exact_up(name, z)
    want.backward(dy)
    table = ACTIVATIONS[name]
    torch.testing.assert_close(table.up(Z), want.float(), rtol=2**-23, atol=0)
    torch.testing.assert_close(table.up_backward(dy.float(), Z), z.grad.float())


def test_names_of_the_table_are_the_keys() -> None:
    assert list(ACTIVATIONS) == ["none", "relu", "gelu", "gelu_tanh", "silu", "swiglu_oai"]
    assert all(activation(name).name == name for name in ACTIVATIONS)


def test_unknown_activation_lists_the_known() -> None:
    with pytest.raises(OptionError, match="activation='swish' is not one of none, relu, gelu"):
        activation("swish")


def test_order_is_bias_activation_gate_residual() -> None:
    z = torch.tensor([[-3.0, 1.0, 2.0, 5.0]])
    bias = torch.tensor([1.0, 1.0, 10.0, 10.0])
    residual = torch.tensor([[100.0, 200.0]])
    # relu(-3 + 1) * (2 + 10) + 100, relu(1 + 1) * (5 + 10) + 200
    assert Epilogue(bias, residual, "relu", True).apply(z).tolist() == [[100.0, 230.0]]
    assert Epilogue(bias, None, "relu").apply(z).tolist() == [[0.0, 2.0, 12.0, 15.0]]


def test_bias_and_residual_follow_the_dtype_of_z() -> None:
    z = torch.zeros(2, 3, dtype=torch.bfloat16)
    y = Epilogue(torch.ones(3), torch.ones(2, 3)).apply(z)
    assert y.dtype == torch.bfloat16
