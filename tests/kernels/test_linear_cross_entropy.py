"""token_nll against dense autograd in float64: values and gradients, every option, odd sizes."""

import pytest
import torch

from kernels.linear_cross_entropy import token_nll


def make(N=37, M=16, V=101, dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "hidden": torch.randn(N, M, generator=generator).to(dtype),
        "weight": torch.randn(V, M, generator=generator).to(dtype),
        "targets": torch.randint(V, (N,), generator=generator),
        "bias": torch.randn(V, generator=generator).to(dtype) if bias else None,
    }
    tensors["targets"][3::5] = -100
    return tensors, torch.randn(N, generator=generator)


def gradients(tensors, upstream, **options):
    leaves = {k: x.detach().clone().requires_grad_() for k, x in tensors.items() if x is not None and k != "targets"}
    nll = token_nll(leaves["hidden"], leaves["weight"], tensors["targets"], bias=leaves.get("bias"), **options)
    nll.backward(upstream.to(nll.dtype))
    return nll.detach(), {k: x.grad for k, x in leaves.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"softcap": 5.0}, {"bias": True, "softcap": 3.0}])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 36, 37, 370, None])
def test_matches_dense_float64(dtype, options, chunk_size):
    tensors, upstream = make(dtype=dtype, bias=options.get("bias", False))
    softcap = options.get("softcap")
    exact = {k: x.double() if x is not None and x.is_floating_point() else x for k, x in tensors.items()}
    nll, grads = gradients(tensors, upstream, softcap=softcap, chunk_size=chunk_size)
    expected, expected_grads = gradients(exact, upstream, softcap=softcap, implementation="reference")
    assert nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((nll - expected).abs() <= 3e-6 * (1 + expected.abs())).all()
    for name, reference in expected_grads.items():
        assert grads[name].dtype == dtype
        error = (grads[name].double() - reference).norm() / reference.norm()
        assert error <= (3e-3 if dtype == torch.bfloat16 else 5e-6), name
