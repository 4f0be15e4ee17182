"""One pass over a pack of samples: its losses, and what comes after its prompts (answers, other options).

The vision tower and the language model see each prompt once: keys and values of the pass are kept for the stock model,
which goes on from there.

Legend: N sequences, K tokens that are kept of the longest, T tokens of the pack, M image tokens, H heads, D width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llavaforge.data.load.pack import Pack
from llavaforge.model.step import StepModule


def expanded(ids: Sequence[int], image_token_id: int, num_image_tokens: int) -> list[int]:
    """Return token ids with every image token written out."""
    return [token for one in ids for token in ([one] * num_image_tokens if one == image_token_id else [one])]


class Prefill:
    """The pass, and what it leaves.

    Args:
        step_module: the model, in its packed form.
        pack: the samples.
        is_continued: keep keys and values.

    Attributes:
        losses: mean loss and number of supervised tokens of each sample.
    """

    @torch.no_grad()
    def __init__(self, step_module: StepModule, pack: Pack, is_continued: bool) -> None:
        self._cache = DynamicCache() if is_continued else None  # no layer of it forgets: masks see to sliding windows
        features_IPD = step_module.image_features(pack) if pack.num_images else None
        self._features_MD = None if features_IPD is None else features_IPD.flatten(0, 1)
        self._image_positions_M = pack.image_positions_M.cpu().numpy()
        self._starts = np.concatenate([[0], np.cumsum(pack.lengths)])
        self._samples = np.split(pack.ids_T.cpu().numpy(), self._starts[1:-1])
        token_losses = step_module.token_losses(pack, features_IPD, self._cache)
        sample_of = torch.searchsorted(pack.cu_seqlens_N1, pack.predictors_S.to(torch.int32), right=True) - 1
        count = torch.bincount(sample_of, minlength=len(pack.lengths))
        total = torch.zeros(len(pack.lengths), device=token_losses.device).index_add_(0, sample_of, token_losses)
        self.losses: list[tuple[float, int]] = list(zip((total / count).tolist(), count.tolist(), strict=True))

    def num_common(self, number: int, ids: Sequence[int]) -> int:
        """Return with how many equal tokens a sample and `ids`, with every image token written out, begin."""
        both = min(len(ids), len(self._samples[number]))
        differ = np.flatnonzero(self._samples[number][:both] != np.asarray(ids[:both]))
        return int(differ[0]) if len(differ) else both

    def cache(self, numbers: Sequence[int], num_kept: Sequence[int], is_last: bool = False) -> DynamicCache:
        """Return keys and values of the first tokens of some samples, filled up on the left to (N, H, K, D).

        Args:
            numbers: of the samples.
            num_kept: how many tokens of each.
            is_last: let go of the pack's own, layer by layer.
        """
        kept, most = np.asarray(num_kept)[:, None], max(num_kept)
        positions_NK = np.maximum(np.arange(most) - (most - kept), 0) + self._starts[list(numbers)][:, None]
        assert self._cache is not None
        cache = DynamicCache()
        for layer, of_pack in enumerate(self._cache.layers):
            assert of_pack.keys is not None and of_pack.values is not None
            places_NK = torch.from_numpy(positions_NK).to(of_pack.keys.device)
            both = [tensor[0][:, places_NK].transpose(0, 1) for tensor in (of_pack.keys, of_pack.values)]
            if is_last:
                of_pack.keys = of_pack.values = None
            cache.update(*both, layer)
        return cache

    def images(self, numbers: Sequence[int], num_kept: Sequence[int]) -> dict[str, Any]:
        """Return what the stock model is given for image tokens that come after those that are kept (there may be one).

        LLaVA's stage 1 asks with the image alone: the token that predicts the first of the answer is the image's last.
        """
        if self._features_MD is None:
            return {}
        begins = self._starts[list(numbers)] + np.asarray(num_kept)
        ends = self._starts[np.asarray(numbers) + 1]
        where = self._image_positions_M
        rows = np.concatenate([np.flatnonzero((where >= a) & (where < b)) for a, b in zip(begins, ends, strict=True)])
        if not len(rows):
            return {}
        features = self._features_MD[torch.from_numpy(rows).to(self._features_MD.device)]
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[features])}}
