"""Compiles every variant of the GPU's kernels for an H100, which takes no GPU. Run by a test, not interpreted."""

from __future__ import annotations

import itertools

import triton
from torch.torch_version import TorchVersion
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hardmix.kernels import mixed_bce_gpu as binary
from hardmix.kernels import mixed_cross_entropy_gpu as softmax

FLOATS = "share soft loss tops scales at_labels grad_loss target weight dense"
TYPES = dict.fromkeys(FLOATS.split(), "*fp32") | {"labels": "*i64", "counts": "*i1", "ignored": "i64"}
TYPES |= dict.fromkeys(("stride", "soft_stride", "loss_stride", "classes"), "i32")
TYPES |= dict.fromkeys(("floor", "eta", "eps"), "fp32")


def compile_kernel(kernel: triton.JITFunction, dtype: str = "fp32", **constants: int | bool) -> None:
    types = TYPES | {"logits": f"*{dtype}", "grad": f"*{dtype}"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    if TorchVersion(triton.__version__) < "3.3":
        source = ASTSource(kernel, {name: kind for name, kind in signature.items() if name not in constants}, constants)
    else:
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    triton.compile(source, target=GPUTarget("cuda", 90, 32))


if __name__ == "__main__":
    for dtype, block in itertools.product(("fp32", "bf16", "fp16"), (2, 1024)):
        for dense, weighted in itertools.product((False, True), (False, True)):
            constants = {"width": 1 if dense else 2, "block": block, "dense": dense, "weighted": weighted}
            compile_kernel(binary._forward, dtype, **constants)
            compile_kernel(binary._backward, dtype, **constants)
        for width, pulled, first, smoothed, soft in (
            (1, False, False, True, False),
            (2, True, False, False, False),
            (3, True, True, True, False),
            (2, True, False, False, True),
        ):
            constants = {"width": width, "lanes": 4 if width > 2 else 2, "block": block, "has_soft": soft}
            constants |= {"regularised": pulled, "asymmetric": first, "smoothed": smoothed}
            compile_kernel(softmax._forward, dtype, **constants)
            compile_kernel(softmax._backward, dtype, width=width, block=block, has_soft=soft)
    compile_kernel(softmax._two_largest, block=1024)
