"""Which modules get liger's kernels; that these compute rightly is proved on a GPU (`tests/machine`)."""

import torch

from llavaforge.machine.random_model import TINY, random_model
from llavaforge.model.liger import has_liger, use_liger


def test_norms_and_mlps_of_this_language_model_alone_change() -> None:
    changed, other = (random_model(TINY, torch.device("cpu"), torch.float32) for _ in range(2))
    kinds = {name: type(module) for name, module in other.named_modules()}
    assert use_liger(changed) == 3 * TINY.layers + 1  # two norms and an MLP in each layer, the last norm
    differing = {name for name, module in changed.named_modules() if type(module) is not kinds[name]}
    assert len(differing) == 3 * TINY.layers + 1 and all("language_model" in name for name in differing)
    assert all(isinstance(module, kinds[name]) for name, module in changed.named_modules())
    assert {name: type(module) for name, module in other.named_modules()} == kinds
    assert not has_liger(torch.device("cpu"))
