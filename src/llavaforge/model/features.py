"""What the vision tower makes of images, outside of any step, and what that depends on.

Comes in: a loaded model and pixels. Goes out: the features that the projector reads.

Legend: I images, C channels, H and W pixels, P image tokens, D tower width.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch

from llavaforge.model.attention import use_packed_attention
from llavaforge.model.feature_layers import feature_width
from llavaforge.model.load import LoadedModel
from llavaforge.model.tower import normalize, tower_features
from llavaforge.model.trainable import cast_parameters

_FORMAT = 1  # raise it when a change of this package changes features
_BATCH = 8  # images that the tower sees at once


class FeatureMaker:
    """Runs the tower of a model whose tower is frozen.

    Args:
        loaded: its tower is moved to the device and cast to `dtype`, as the engine does later.
        device: of this process.
        dtype: that is computed in.
    """

    def __init__(self, loaded: LoadedModel, device: torch.device, dtype: torch.dtype) -> None:
        self._loaded, self._device, self._dtype = loaded, device, dtype
        tower = loaded.model.model.vision_tower
        cast_parameters(tower, dtype)
        tower.to(device).eval()
        use_packed_attention(loaded.model)

    @torch.no_grad()
    def __call__(self, pixels_ICHW: torch.Tensor) -> torch.Tensor:
        """Return the features of `uint8` pixels, (I, P, D) on the CPU.

        A batch is filled up to one size with its last image: then an image's features do not depend on which others
        are computed with it, also where a GPU chooses its kernels by the size of the batch.
        """
        found = []
        for part in pixels_ICHW.split(_BATCH):
            batch = torch.cat([part, part[-1:].expand(_BATCH - len(part), -1, -1, -1)]).to(self._device)
            features_IPD = tower_features(self._loaded.model, normalize(batch, self._loaded.preprocessing, self._dtype))
            found.append(features_IPD[: len(part)].cpu())
        return torch.cat(found)


def feature_shape(loaded: LoadedModel) -> tuple[int, int]:
    """Return (P, D) of an image's features."""
    return loaded.num_image_tokens, feature_width(loaded.model.config)


def describe_features(loaded: LoadedModel, device: torch.device, dtype: torch.dtype) -> str:
    """Return a digest of all that an image's features depend on, besides the image, to the last bit."""
    config, tensors = loaded.model.config, loaded.model.model.vision_tower.state_dict()
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))
    settings = ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "image_size")
    parts = {
        "format": [_FORMAT, _BATCH],
        "tower": sums,
        "settings": [getattr(config.vision_config, name, None) for name in settings],
        "read": [config.vision_feature_layer, config.vision_feature_select_strategy],
        "preprocessing": asdict(loaded.preprocessing),
        # Other kernels, and sums over another number of threads, differ in the last digits.
        "computed": [torch.__version__, str(dtype), *_processor(device)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _processor(device: torch.device) -> tuple[str, int]:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), 0
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}", torch.get_num_threads()


def _digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
