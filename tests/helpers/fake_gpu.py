"""Tensors that say they are on a GPU and are computed on the CPU: what only fails on a GPU fails here.

``with fake_gpu() as gpu:`` gives a machine whose tensors have the device ``cuda:0`` for all Python code. Their values
are real, in tensors on the CPU. As on a GPU

* an operation on tensors of two devices raises, unless the one on the CPU is a number (0-dim) in a pointwise operation;
* what makes the host wait for the device is counted in ``gpu.waits``, by the name of the operation and the line of this
  package: values read (``item``, ``tolist``, ``bool``, ``nonzero``, an index of bools) and copies from and to the CPU;
* an operation on the meta device, in NumPy or by a data pointer raises.

Streams are not simulated, and kernels are not run: the backend ``torch`` computes. With ``kernels_alone`` Triton's are
launched for an H200, in that their arguments are checked: what they would have written are then zeros.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import fused_gopd

CUDA = torch.device("cuda", 0)
PACKAGE = str(Path(fused_gopd.__file__).parent)
_aten = torch.ops.aten
# the size of the result is a value of the input
_READS = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.equal,
    _aten.is_nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.bincount,
}


def _product(left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    found = (left.float() @ right.float()).to(out_dtype)
    return found if out is None else out.copy_(found)


def _added(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Any = None,
) -> Tensor:
    found = torch.addmm(total.float(), left.float(), right.float(), beta=beta, alpha=alpha).to(out_dtype)
    return found if out is None else out.copy_(found)


# Products with a result of another dtype, which PyTorch has on GPUs alone
_PRODUCTS = {
    _aten.mm.dtype: _product,
    _aten.mm.dtype_out: _product,
    _aten.addmm.dtype: _added,
    _aten.addmm.dtype_out: _added,
}
_gpus: list[FakeGPU] = []


class OnGPU(Tensor):
    """A tensor on the CPU, ``inner``, that says it is on ``cuda:0``."""

    inner: Tensor

    @staticmethod
    def __new__(cls: Any, inner: Tensor) -> Any:
        assert type(inner) is Tensor, type(inner)
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=inner.device,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        _gpus[-1].waited("tolist")
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnGPU({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _gpus[-1].check(func, args, kwargs)
        inner_args, inner_kwargs = tree_map_only(OnGPU, lambda x: x.inner, (args, kwargs))
        found = _PRODUCTS.get(func, func)(*inner_args, **inner_kwargs)
        found = tree_map_only(Tensor, OnGPU, found)
        return return_and_correct_aliasing(func, args, kwargs, found)


def _is_cuda(x: Any) -> bool:
    return (isinstance(x, torch.device) and x.type == "cuda") or (isinstance(x, str) and x.split(":")[0] == "cuda")


class FakeGPU(TorchFunctionMode):
    """The machine: it makes tensors on the device ``cuda``, moves them, and counts what waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def put(self, x: Any) -> Any:
        """The same structure with its tensors on the GPU; leaves stay leaves."""
        return tree_map_only(
            Tensor,
            lambda t: t if isinstance(t, OnGPU) else OnGPU(t.detach().clone()).requires_grad_(t.requires_grad),
            x,
        )

    def waited(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
        where = f" in {Path(frames[-1].filename).name}:{frames[-1].name}" if frames else ""
        self.waits[what + where] += 1

    def engine(self, run: Any) -> Any:
        """Backwards start in a function that has this mode off."""

        def backward(*args: Any, **kwargs: Any) -> Any:
            with self:
                return run(*args, **kwargs)

        return backward

    def check(self, func: Any, args: Any, kwargs: Any) -> None:
        op, tensors = func.overloadpacket, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        others = [x for x in tensors if not isinstance(x, OnGPU)]
        indices = [x for x in tree_leaves(args[1:2]) if isinstance(x, Tensor)] if "index" in func.__name__ else []
        if op in _READS or (op is _aten.repeat_interleave and kwargs.get("output_size") is None):
            self.waited(op.__name__)
        elif op in (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_):
            others = [x for x in others if all(x is not i for i in indices)]  # is copied
            filled = op is not _aten.index and args[2].ndim == 0  # becomes masked_fill
            if any(not isinstance(i, OnGPU) or (i.dtype in (torch.bool, torch.uint8) and not filled) for i in indices):
                self.waited("an index of bools, or from the CPU")
        elif op is _aten.copy_:
            if others:
                self.waited("copy_")
            return
        wrong = [x for x in others if x.ndim or torch.Tag.pointwise not in func.tags]
        if wrong:
            raise RuntimeError(f"{func}: tensors on cuda:0 and on {wrong[0].device}, {tuple(wrong[0].shape)}")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, (torch.device, str))]
        here = any(map(_is_cuda, given))
        first = args[0] if args else None
        if name in ("to", "cpu", "cuda", "type_as", "tolist", "numpy") or (name == "new_tensor"):
            found = self._moved(name, here, func, args, kwargs)
            if found is not NotImplemented:
                return found
        if not here:
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda x: torch.device("cpu") if _is_cuda(x) else x, (args, kwargs))
        if name in ("tensor", "as_tensor", "asarray"):
            if isinstance(first, OnGPU):
                return first
            self.waited(f"{name} from the host")
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda t: t if isinstance(t, OnGPU) else OnGPU(t), found)

    def _moved(self, name: str, here: bool, func: Any, args: Any, kwargs: Any) -> Any:
        first, *rest = args
        if name == "new_tensor" and isinstance(first, OnGPU) and not kwargs.get("device"):
            self.waited("new_tensor from the host")
            return OnGPU(first.inner.new_tensor(*rest, **kwargs))
        if name == "type_as":
            here, rest = isinstance(rest[0], OnGPU), [rest[0].dtype]
        elif name == "to" and rest and isinstance(rest[0], Tensor):
            here, rest = isinstance(rest[0], OnGPU), [rest[0].dtype, *rest[1:]]
        elif name == "to":
            named = [x for x in (*rest, *kwargs.values()) if isinstance(x, (torch.device, str))]
            here = here if named else isinstance(first, OnGPU)
        elif name == "cuda":
            here = True
        elif name == "cpu":
            here = False
        else:
            return NotImplemented
        rest = [x for x in rest if not isinstance(x, (torch.device, str))]
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "memory_format")}
        if here == isinstance(first, OnGPU):
            return first.to(*rest, **kwargs) if rest or kwargs else first
        self.waited(f"{name} to the {'device' if here else 'host'}")
        moved = _Moved.apply(first, here)
        return moved.to(*rest, **kwargs) if rest or kwargs else moved


class _Moved(torch.autograd.Function):
    """A copy to the other device, differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, here: bool) -> Tensor:
        ctx.here = here
        return OnGPU(x.detach().clone()) if here else x.inner.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return (g.inner.clone() if ctx.here else OnGPU(g.detach().clone())), None


@contextlib.contextmanager
def fake_gpu(capturing: bool = False) -> Iterator[FakeGPU]:
    """A GPU for the tensors that ``gpu.put`` gives, and for what is made of them; ``capturing``: a CUDA graph."""
    gpu = FakeGPU()
    _gpus.append(gpu)
    try:
        with (
            mock.patch("torch.cuda.is_current_stream_capturing", return_value=capturing),
            mock.patch("torch.autograd._engine_run_backward", gpu.engine(torch.autograd._engine_run_backward)),
            gpu,
        ):
            yield gpu
    finally:
        _gpus.pop()


@contextlib.contextmanager
def kernels_alone() -> Iterator[list[str]]:
    """The names of the kernels that Triton would launch, each with the tensors of its arguments on the GPU."""
    from fused_gopd.rowops import triton

    started: list[str] = []

    def start(launch: Any, device: torch.device) -> None:
        for name, x in launch.arguments.items():
            assert not isinstance(x, Tensor) or isinstance(x, OnGPU), f"{name} of {launch.kernel} is on {x.device}"
        started.append(launch.kernel.__name__)

    with (
        mock.patch.object(triton.Launch, "_start", start),
        mock.patch.object(triton.Device, "of", return_value=triton.Device()),
        mock.patch.object(triton, "unavailable_reason", return_value=None),
        mock.patch("torch.cuda.current_device", return_value=0),
        mock.patch("torch.empty", torch.zeros),  # no values of other tensors, which might be refused
        mock.patch("torch.empty_like", torch.zeros_like),
    ):
        yield started
