"""What a hand-written derivative has to keep to for the compiler's sake."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import hardmix
from hardmix import losses

ROOT = Path(hardmix.__file__).parent


def forwards(path: Path) -> list[ast.FunctionDef]:
    """The forward passes of the autograd functions in a file."""
    classes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ClassDef)]
    functions = [
        node for node in classes if any(ast.unparse(base).endswith("autograd.Function") for base in node.bases)
    ]
    return [
        item for node in functions for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "forward"
    ]


def written_in_place(forward: ast.FunctionDef) -> list[str]:
    """What it returns that is the result of an operation in place, or a variable that one was done to."""
    returned = [node.value for node in ast.walk(forward) if isinstance(node, ast.Return) and node.value is not None]
    parts = [part for value in returned for part in (value.elts if isinstance(value, ast.Tuple) else [value])]
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    for node in ast.walk(forward):
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id in names for to in node.targets):
            parts.append(node.value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and node.target.id in names:
            return [ast.unparse(node)]
        elif isinstance(node, ast.Expr) and ast.unparse(node).split(".")[0] in names:
            parts.append(node.value)
    ways = [way for part in parts for way in ([part.body, part.orelse] if isinstance(part, ast.IfExp) else [part])]
    return [ast.unparse(way) for way in ways if _is_in_place(way)]


def _is_in_place(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr.endswith("_")


PATHS = [path for path in sorted(ROOT.rglob("*.py")) if forwards(path)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_nothing_that_was_written_in_place_is_returned(path: Path) -> None:
    """torch 2.11 compiles that to a wrong gradient, and says nothing."""
    for forward in forwards(path):
        assert written_in_place(forward) == []


@pytest.mark.parametrize(
    "body",
    [
        "return x.exp_()",
        "return x.exp_(), y",
        "r = x.exp_() if y else x\n return r",
        "r = x\n r += 1\n return r",
        "r = x * 1\n r.exp_()\n return r",
    ],
)
def test_the_check_sees(body: str) -> None:
    (forward,) = ast.parse(f"def forward(ctx, x, y):\n {body}").body
    assert isinstance(forward, ast.FunctionDef)
    assert written_in_place(forward) != []


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: losses.clip_loss(z, torch.eye(4), 10.0),
        lambda z: losses.supcon_loss(z, torch.tensor([0, 0, 1, 1])),
        lambda z: losses.supremix_loss(z, torch.arange(4.0), window=2.0, mix_neg=False),
        lambda z: losses.rank_n_contrast_loss(z, torch.arange(4.0)),
        lambda z: losses.ranksim_loss(z, torch.arange(4.0)),
    ],
    ids=["clip", "supcon", "supremix", "rank-n-contrast", "ranksim"],
)
@pytest.mark.filterwarnings("ignore:.torch.jit")  # from inside torch, of a kind that changes
def test_function_transforms_are_refused_in_our_own_words(loss) -> None:
    z = torch.nn.functional.normalize(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    assert loss(z).isfinite()
    ways = (
        lambda: torch.func.grad(loss)(z),
        lambda: torch.func.vmap(loss)(z[None]),
        lambda: torch.func.jvp(loss, (z,), (z,)),
    )
    for way in ways:
        with pytest.raises(NotImplementedError, match=r"have a backward pass written by hand, which torch\.func"):
            way()
