"""Promise: what a process leaves out when it loads models is there when it is used, and nothing else changes."""

import subprocess
import sys

_CODE = """
import sys

import torch
from chainfed_ray.device.lean_imports import load_models

load_models()
left_out = {"accelerate", "scipy", "torch._dynamo", "torch.distributed.tensor"}
assert not left_out & set(sys.modules)

from transformers import AutoModel, BertConfig, masking_utils, utils

assert utils.is_accelerate_available() and utils.is_torch_distributed_available()
torch.manual_seed(0)
small = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
model = AutoModel.from_config(small).eval()
ids = torch.arange(12).reshape(2, 6)
plain = model(ids).last_hidden_state
assert not {"torch._dynamo"} & set(sys.modules)

with masking_utils.TransformGetItemToIndex():  # the class of torch's compiler, loaded now
    pass
compiled = torch.compile(model, backend="eager")
assert torch.equal(compiled(ids).last_hidden_state, plain)
assert sys.modules["torch._dynamo"].__file__

load_models()  # once more, when there is nothing left to spare
"""


def test_what_is_left_out_is_loaded_when_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
