"""From a trained model to a Core AI program, and to its results: what docs/convert.md spells out.

    program = convert(model.eval(), (example_input,), input_names=["x"], output_names=["y"])
    print(composites(program))                        # the rms_norm of every norm
    program.save_asset(Path("model.aimodel"))
    with load("model.aimodel") as run:
        y = run(x=x)["y"]

These are shorthands for Apple's `TorchConverter` and `coreai.runtime`, with tensors in and out, and
with arguments that are checked first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._coexistence import INSTALL as INSTALL
from .composite_ops import RMSNormImpl

if TYPE_CHECKING:
    from coreai.authoring import AIProgram

RMS_NORM_ATTRS = ("axes", "eps")


def convert(
    model: nn.Module,
    args: tuple[Any, ...],
    *,
    dynamic_shapes: Any = None,
    externalize_modules: Sequence[Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> AIProgram:
    """Convert a model to a Core AI program that has composite ops.

    Args:
        model: in the mode to convert, normally `model.eval()`. It is what it was afterwards.
        args: example arguments of its forward. Their shapes are the program's, save for what
            `dynamic_shapes` says.
        dynamic_shapes: as for :func:`torch.export.export`.
        externalize_modules: an `ExternalizeSpec`, or just a class, for each class of submodules to
            keep as an op. By default `RMSNormImpl`, as ``rms_norm`` with the attributes axes and
            eps.
        input_names, output_names: of the program's function ``main``; by default the converter's.

    Raises:
        ImportError: Apple's converter is not installed.
        ValueError: the model is itself what should be kept, or such a module has a name that the
            converter cannot use, or lacks an attribute that it is to have.
        RuntimeError: the model cannot be exported.
    """
    from coreai_torch import ExternalizeSpec, TorchConverter, get_decomp_table

    specs = (
        [ExternalizeSpec(RMSNormImpl, "rms_norm", list(RMS_NORM_ATTRS))]
        if externalize_modules is None
        else [ExternalizeSpec(s) if isinstance(s, type) else s for s in externalize_modules]
    )
    for spec in specs:
        _check_externalized(model, spec)

    def export(module: nn.Module) -> torch.export.ExportedProgram:
        exported = torch.export.export(module, args=args, dynamic_shapes=dynamic_shapes)
        decomposed: torch.export.ExportedProgram
        decomposed = exported.run_decompositions(get_decomp_table())
        return decomposed

    converter = TorchConverter().add_pytorch_module(
        model,
        export_fn=export,
        externalize_modules=specs,
        input_names=input_names,
        output_names=output_names,
    )
    return converter.to_coreai()


def composites(program: AIProgram) -> dict[str, str]:
    """The composite declarations of a program, by the names of their graphs."""
    graphs = [op.attributes for op in program._module._mlir_module.body.operations]
    return {
        str(graph["sym_name"]).strip('"'): str(graph["composite_decl"])
        for graph in graphs
        if "composite_decl" in graph
    }


@contextmanager
def load(path: str | Path, function: str = "main") -> Iterator[Callable[..., dict[str, Tensor]]]:
    """Load a saved program in Core AI's runtime, as a context manager.

    Args:
        path: of an ``.aimodel`` that `AIProgram.save_asset` has written.
        function: the program's function to run.

    Yields:
        A callable, with the program's inputs as keyword arguments, tensors on the CPU of the dtypes
        and shapes that it was converted for; int64 is passed on as the int32 that the converter
        makes of it. It returns its outputs by name.

    Raises:
        ImportError: the runtime is not installed.
        FileNotFoundError: there is no program.
        ValueError: (the callable) other names than those of the inputs, or integers that take more
            than 32 bits.
        RuntimeError: (the callable) other dtypes or shapes; and in a thread that is running an
            event loop, as notebooks do: `coreai.runtime` itself is for these.
    """
    try:
        from coreai.authoring import AIModelAsset
        from coreai.runtime import NDArray
    except ImportError as error:
        raise ImportError(
            f"load: expected Core AI's runtime, coreai-core, to be installed, got: {error}; "
            f"install it with: {INSTALL}"
        ) from error
    if not Path(path).is_dir():
        raise FileNotFoundError(
            f"load: expected path to be a program that save_asset has written, got {path}"
        )

    loop, stack = asyncio.new_event_loop(), AsyncExitStack()
    executable = AIModelAsset.load(path).executable()
    try:
        model = loop.run_until_complete(stack.enter_async_context(executable))
        compiled = model.load_function(function)
        names = list(compiled.desc.input_names)

        def run(**inputs: Tensor) -> dict[str, Tensor]:
            if set(inputs) != set(names):
                raise ValueError(
                    f"{function}: expected inputs {', '.join(names)}, got {', '.join(inputs)}"
                )
            arrays = {name: NDArray(_to_numpy(tensor)) for name, tensor in inputs.items()}
            outputs = loop.run_until_complete(compiled(arrays))
            return {name: _to_tensor(array.numpy()) for name, array in outputs.items()}

        yield run
    finally:
        loop.run_until_complete(stack.aclose())
        loop.close()


def _check_externalized(model: nn.Module, spec: Any) -> None:
    target = spec.target_class
    if isinstance(model, target):
        raise ValueError(
            f"convert: expected model to have {target.__name__} among its submodules, got a "
            f"{target.__name__} itself; make it a submodule, as only these are kept as ops"
        )
    hint = "; it has axes, eps and version" if target is RMSNormImpl else ""
    for name, module in model.named_modules():
        if not isinstance(module, target):
            continue
        if name[0].isdigit():
            raise ValueError(
                f"convert: expected {target.__name__} at a path that begins with a letter, got "
                f"{name!r}; give the nn.Sequential or nn.ModuleList a name in a module around it"
            )
        for attr in spec.composite_attrs or ():
            if not hasattr(module, attr):
                raise ValueError(
                    f"convert: expected composite_attrs to be attributes of {target.__name__}, "
                    f"got {attr!r}" + hint
                )


# numpy has no bfloat16; the runtime takes and gives that of the package ml_dtypes.


def _to_numpy(tensor: Tensor) -> Any:
    import ml_dtypes

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.int64:  # the converter makes int32 of it
        narrow = tensor.int()
        if not torch.equal(narrow, tensor):
            raise ValueError("expected integers that fit into 32 bits, got larger ones")
        return narrow.numpy()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_tensor(array: Any) -> Tensor:
    import ml_dtypes
    import numpy as np

    array = np.array(array)  # a copy: the runtime may use its memory again
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
