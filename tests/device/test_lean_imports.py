"""Promise: what a process leaves out when it loads models is there when it is used, and nothing else changes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# What comes before a use, in a process that has loaded models, and what must hold after it.
_COMPILER = (
    """
left_out = {"accelerate", "scipy", "torch._dynamo.convert_frame", "torch.distributed.tensor"}
assert not left_out & set(sys.modules)

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, BertConfig, masking_utils, utils

assert utils.is_accelerate_available() and utils.is_torch_distributed_available()
torch.manual_seed(0)
small = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
model = AutoModel.from_config(small).eval()
ids = torch.arange(12).reshape(2, 6)
plain = model(ids).last_hidden_state
with FakeTensorMode():
    assert (torch.ones(2, 3) @ torch.ones(3, 4)).shape == (2, 4)
settings = sys.modules["torch._dynamo.config"]
from torch.utils.checkpoint import checkpoint

again = torch.ones(3, requires_grad=True)
checkpoint(torch.exp, again, use_reentrant=False).sum().backward()
assert again.grad is not None
assert not left_out & set(sys.modules)
load_models()  # once more, which changes nothing
""",
    """
assert "torch._dynamo.convert_frame" in sys.modules
import torch._dynamo

assert torch._dynamo.config is settings and sys.modules["torch._dynamo"].__file__
assert torch._dynamo.source is sys.modules["torch._dynamo.source"]
""",
    # What loads the compiler: a function of it, a module of it, and the masks that are made by vmap.
    (
        "assert torch.equal(torch.compile(model, backend='eager')(ids).last_hidden_state, plain)",
        "from torch._dynamo.source import LocalSource; assert LocalSource is sys.modules['torch._dynamo.source'].LocalSource",
        "from concurrent.futures import ThreadPoolExecutor; old = sys.modules['torch._dynamo']; "
        "assert len(set(ThreadPoolExecutor(4).map(lambda _: id(old.mark_static_address), range(4)))) == 1",
        "with masking_utils.TransformGetItemToIndex(): import torch._dynamo; torch._dynamo.reset()",
    ),
)
_ALGEBRA = (
    """
layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).to("meta")
assert layer(torch.ones(2, 5, 3, device="meta")).shape == (2, 5, 4)
for wrong in (torch.ones(2, 4, device="meta"), torch.ones((), device="meta")):
    try:
        layer(wrong)
    except RuntimeError:
        pass
    else:
        raise AssertionError("sizes that do not fit")
from importlib.util import find_spec

assert find_spec("sympy").origin, "the documentation of SymPy is among the rows of builtin:docstrings"
assert "sympy.core" not in sys.modules
old = sys.modules["sympy"]
""",
    """
assert "sympy.core" in sys.modules and sys.modules["sympy"].__file__
import sympy

assert old.Basic is sympy.Basic and old is not sympy
""",
    (
        "from sympy.core.basic import Basic; assert old.Basic is Basic; import sympy; assert sympy.core.basic.Basic is Basic; "
        "assert sympy.Symbol('n') + 1 - 1 == sympy.Symbol('n')",
        """
from torch.fx.experimental.symbolic_shapes import ShapeEnv, guard_or_false, sym_eq

size = ShapeEnv().create_unbacked_symint()
assert not guard_or_false(size == 3) and not isinstance(sym_eq((size, 1), (2, 1)), bool)
""",
        "from concurrent.futures import ThreadPoolExecutor; "
        "assert len(set(ThreadPoolExecutor(4).map(lambda _: id(old.Symbol), range(4)))) == 1",
    ),
)
_PLAN = """
from pathlib import Path

from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.costs import memory_profile_of

memory_profile_of(Blocks(Path(folder), torch.float32), 4, 3, 2)
assert not {"accelerate", "scipy", "torch._dynamo.convert_frame"} & set(sys.modules)
"""
# Each program has a process of its own, in which nobody has used anything before. They begin as copies of one, which takes
# seconds.
_EACH = """
import json
import os
import sys

import torch
from chainfed_ray.device.lean_imports import load_models

load_models()
folder, programs = json.loads(sys.argv[1])
for program in programs:
    child = os.fork()
    if not child:
        exec(program)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, program
"""


@pytest.mark.slow
def test_what_is_left_out_is_loaded_when_it_is_used(tiny_model_folder: Path) -> None:
    """And a plan uses none of it."""
    uses = [f"{before}\n{use}\n{after}" for before, after, each in (_COMPILER, _ALGEBRA) for use in each]
    given = json.dumps((str(tiny_model_folder), [_PLAN, *uses]))
    done = subprocess.run([sys.executable, "-c", _EACH, given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
