"""Tests of Triton kernels on the CPU, in Triton's interpreter.

``triton.jit`` reads TRITON_INTERPRET when it decorates, so a process has interpreted kernels or compiled ones.
``../test_interpreter.py`` runs this folder in processes of its own. By hand:

    TRITON_INTERPRET=1 pytest tests/kernels/interpreted
"""

import os

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(x):
        """The interpreter keeps bfloat16 as its bits in uint16, and would multiply the bits."""
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_bfloat16_dot(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_bfloat16_dot

    def call_helper(self, *args, **kwargs):
        """Without patching Triton's language, which takes half of the time, where the launch has done it already."""
        languages = [x for x in (tl, tl.core) if x in map(self.fn.__globals__.get, ("tl", "core"))]
        if not languages or any(tl.core.is_builtin(x.full) for x in languages):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_helper

    # Half of what is left: a table made anew for each array, and each whole number of shapes this small computed
    # in 64 bits too, to see whether 32 were enough.
    dtype_of, dtypes = interpreter._get_np_dtype, {}

    def kept_dtype(dtype):
        name = dtype.scalar.name
        return dtypes[name] if name in dtypes else dtypes.setdefault(name, dtype_of(dtype.scalar))

    interpreter._get_np_dtype = kept_dtype
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@pytest.fixture(autouse=True)
def silent_infinities():
    """Where a GPU computes e^1000 = ∞ in silence, NumPy warns; NaN, which no kernel may make, still does."""
    with np.errstate(over="ignore", divide="ignore"):
        yield
