"""The step module computes what stock transformers computes, packed or one by one."""

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image

from llavaforge.data.load.pack import Pack
from llavaforge.data.text.sample import IGNORE_INDEX, Sample
from llavaforge.model.load import LoadedModel, load_model
from llavaforge.model.loss import LossHead
from llavaforge.model.step import StepModule
from llavaforge.model.tower import normalize
from train_tools import open_packs, pack_of, train_config

NUM_SAMPLES = 6


@pytest.fixture
def loaded(tiny_llava: Path) -> LoadedModel:
    return load_model(str(tiny_llava))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        bound = 1e-5 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(gradient, other[name], rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def test_packed_loss_and_gradients_equal_one_by_one(loaded: LoadedModel, shapes: Path, tmp_path: Path) -> None:
    _, dataset = open_packs(loaded, train_config(loaded.path, shapes / "train", tmp_path))
    module = StepModule(loaded.model, loaded.preprocessing)
    packed = module(pack_of(dataset, *range(NUM_SAMPLES)))
    packed.backward()
    packed_gradients = gradients(loaded.model)
    total = torch.zeros(())
    for sample in range(NUM_SAMPLES):
        loss = module(pack_of(dataset, sample))
        loss.backward()
        total += loss.detach()
    assert packed.item() == pytest.approx(total.item(), rel=1e-5)
    assert_close_gradients(packed_gradients, gradients(loaded.model))


def test_loss_equals_plain_transformers_with_labels(loaded: LoadedModel, shapes: Path, tmp_path: Path) -> None:
    index, dataset = open_packs(loaded, train_config(loaded.path, shapes / "train", tmp_path))
    stock = copy.deepcopy(loaded.model)
    module = StepModule(loaded.model, loaded.preprocessing)
    for number in range(NUM_SAMPLES):
        row = index.row(number)
        sample = Sample(row.ids.tolist(), row.supervised_spans.tolist(), row.length)
        with Image.open(index.data_sets[0].source.images.root / row.images[0].name) as opened:
            pixels = loaded.processor.image_processor(opened, return_tensors="pt")["pixel_values"]
        labels, ids = [], []
        for token, label in zip(sample.ids, sample.labels(), strict=True):
            repeats = loaded.num_image_tokens if token == loaded.image_token_id else 1
            ids += [token] * repeats
            labels += [label] * repeats
        expected = stock(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values=pixels,
            labels=torch.tensor([labels]),
        ).loss
        pack = pack_of(dataset, number)
        assert sum(label != IGNORE_INDEX for label in labels) == pack.num_supervised
        assert (module(pack) / pack.num_supervised).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("every", "num_again"), [(1, 2), (2, 1)])
def test_gradient_checkpointing_changes_nothing(
    every: int, num_again: int, loaded: LoadedModel, shapes: Path, tmp_path: Path
) -> None:
    _, dataset = open_packs(loaded, train_config(loaded.path, shapes / "train", tmp_path))
    pack = pack_of(dataset, 0, 1, 2)
    loaded.model.train()
    loaded.model.model.vision_tower.requires_grad_(False)
    StepModule(loaded.model, loaded.preprocessing)(pack).backward()
    without = gradients(loaded.model)
    module = StepModule(loaded.model, loaded.preprocessing, every)
    layers = loaded.model.model.language_model.layers
    assert sum(layer.gradient_checkpointing for layer in layers) == num_again and len(layers) == 2
    module(pack).backward()
    assert_close_gradients(without, gradients(loaded.model))


def test_frozen_tower_builds_no_graph_even_with_checkpointing(
    loaded: LoadedModel, shapes: Path, tmp_path: Path
) -> None:
    _, dataset = open_packs(loaded, train_config(loaded.path, shapes / "train", tmp_path))
    loaded.model.model.vision_tower.requires_grad_(False)
    layer = loaded.model.model.vision_tower.encoder.layers[0]
    seen: list[bool] = []
    layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.requires_grad))
    StepModule(loaded.model.train(), loaded.preprocessing, recompute_every=1)(pack_of(dataset, 0)).backward()
    assert seen == [False]


def test_layers_after_the_feature_layer_do_not_run(loaded: LoadedModel, shapes: Path, tmp_path: Path) -> None:
    _, dataset = open_packs(loaded, train_config(loaded.path, shapes / "train", tmp_path))
    ran: list[str] = []
    tower = loaded.model.model.vision_tower
    for name, module in [*tower.encoder.layers.named_children(), ("post_layernorm", tower.post_layernorm)]:
        module.register_forward_hook(lambda _module, _inputs, _output, name=name: ran.append(name))
    StepModule(loaded.model, loaded.preprocessing)(pack_of(dataset, 0))
    assert ran == ["0", "1"]  # of three layers, at vision_feature_layer -2


def test_text_only_pack_gives_the_projector_a_zero_gradient(loaded: LoadedModel) -> None:
    module = StepModule(loaded.model, loaded.preprocessing)
    ids = torch.arange(10, 16)
    text = Pack(
        image_positions_M=torch.zeros(0, dtype=torch.long),
        ids_T=ids,
        position_ids_T=torch.arange(6),
        cu_seqlens_N1=torch.tensor([0, 6], dtype=torch.int32),
        lengths=(6,),
        predictors_S=torch.tensor([3, 4]),
        targets_S=ids[4:6],
        pixels_ICHW=torch.zeros(0, dtype=torch.uint8),
    )
    module(text).backward()
    tower, projector = loaded.model.model.vision_tower, loaded.model.model.multi_modal_projector
    assert projector.linear_1.weight.grad is not None and not projector.linear_1.weight.grad.any()
    assert tower.encoder.layers[0].mlp.fc1.weight.grad is not None


def test_image_features_equal_the_stock_models(loaded: LoadedModel, tiny_llava: Path) -> None:
    module = StepModule(loaded.model, loaded.preprocessing)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, generator=generator)
    stock = loaded.model.get_image_features(normalize(pixels, loaded.preprocessing, torch.float32)).pooler_output
    torch.testing.assert_close(module._of_pixels(pixels), torch.stack(list(stock)), rtol=0, atol=0)


def test_loss_in_chunks_equals_loss_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 20), torch.randn(50, 8, requires_grad=True)
    places, targets = torch.arange(0, 46, 2), torch.randint(0, 20, (23,))
    loss_head = LossHead(head)
    whole = loss_head(hidden, places, targets)
    whole.backward()
    weight, at_hidden = head.weight.grad.clone(), hidden.grad.clone()
    head.zero_grad()
    hidden.grad = None
    monkeypatch.setattr("llavaforge.model.loss.CHUNK", 5)
    chunked = loss_head(hidden, places, targets)
    chunked.backward()
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(head.weight.grad, weight)
    torch.testing.assert_close(hidden.grad, at_hidden)
