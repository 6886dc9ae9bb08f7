"""Images: what patches are called, states of changing size, logits by another name, patches cut up beforehand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from transformers import (
    PPLCNetConfig,
    PPLCNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Siglip2Config,
    Siglip2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import maskhooks
from maskhooks import DiffMask, Hooked, Random
from maskhooks.errors import PatternError

LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**LAYERS, image_size=32, patch_size=8))


def swin() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    return SwinForImageClassification(SwinConfig(image_size=32, patch_size=4, **sizes))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes))


def pixels(height: int = 32, width: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))}


def names(hooked: Hooked, depth: int, batch: dict[str, Tensor]) -> list[str] | None:
    found = hooked.task.names(hooked.sites.tagged("hidden")[depth], batch)
    return None if found is None else list(found[0])


@pytest.mark.parametrize("known", [True, False])
def test_patches_are_called_by_row_and_column_after_the_class_token(known: bool) -> None:
    hooked = maskhooks.wrap(vit(), example=pixels() if known else None)
    found = names(hooked, 1, pixels())
    assert found is not None
    assert found[:6] == ["[CLS]", "(0, 0)", "(0, 1)", "(0, 2)", "(0, 3)", "(1, 0)"]
    assert len(found) == 17
    head = hooked.sites.tagged("head")[0]
    assert hooked.task.names(head, pixels()) == [found, found]


def test_images_of_another_size_have_their_own_patches() -> None:
    hooked = maskhooks.wrap(vit())
    found = names(hooked, 1, pixels(16, 24))
    assert found is not None
    assert found == ["[CLS]", *(f"({row}, {column})" for row in range(2) for column in range(3))]
    assert names(hooked, 1, pixels(20, 20)) is None


def test_merged_patches_are_called_by_their_own_grid() -> None:
    model = swin()
    hooked = maskhooks.wrap(model, example=pixels())
    sizes = {len(found) for depth in range(1, 4) if (found := names(hooked, depth, pixels())) is not None}
    assert sizes == {64, 16}
    assert names(hooked, 3, pixels()) == [f"({row}, {column})" for row in range(4) for column in range(4)]


def test_an_explanation_of_an_image_names_its_patches() -> None:
    hooked = maskhooks.wrap(vit(), example=pixels())
    hidden = Random(hooked, "hidden").explain(pixels())
    site = str(hooked.sites.tagged("hidden")[1])
    own = hidden.select(site=site, example=0)
    assert list(own["label"][:3]) == ["[CLS]", "(0, 0)", "(0, 1)"]
    given = Random(hooked, "input").explain(pixels()).select(example=1)
    assert list(given["label"]) == [f"({row}, {column})" for row in range(4) for column in range(4)]
    assert [f"({row}, {column})" for row, column in zip(given["row"], given["column"], strict=True)] == list(
        given["label"]
    )


def test_names_of_patches_go_with_a_copy() -> None:
    hooked = maskhooks.wrap(vit())
    assert names(copy.deepcopy(hooked), 1, pixels()) == names(hooked, 1, pixels())


def test_masks_of_an_image_are_read_from_states_of_its_size_alone() -> None:
    explainer = DiffMask(maskhooks.wrap(resnet(), example=pixels()), "input")
    assert explainer.conditioned_on == explainer.sites
    explainer.fit([pixels()], steps=2, progress=False)
    assert explainer.explain(pixels())["score"].shape == (2 * 16 * 16,)


def test_states_of_other_sizes_are_refused_before_training() -> None:
    explainer = DiffMask(maskhooks.wrap(resnet()), "input")
    with pytest.raises(PatternError, match=r"has 128 valid positions .* has 512\. Read sites with the same positions"):
        explainer.fit([pixels()], steps=2, progress=False)


def test_logits_under_the_name_of_the_last_hidden_state() -> None:
    torch.manual_seed(0)
    hooked = maskhooks.wrap(PPLCNetForImageClassification(PPLCNetConfig(scale=0.25, class_expand=16)).eval())
    with torch.no_grad():
        outputs = hooked(pixels())
        result = hooked.distribution(outputs, pixels())
    assert isinstance(result, Categorical)
    assert torch.equal(result.logits, Categorical(logits=outputs.last_hidden_state).logits)
    assert len(hooked.sites.tagged("input")) == 1


def test_patches_that_are_cut_up_beforehand() -> None:
    torch.manual_seed(0)
    vision = {**LAYERS, "patch_size": 4, "num_patches": 16}
    hooked = maskhooks.wrap(Siglip2ForImageClassification(Siglip2Config(text_config=LAYERS, vision_config=vision)))
    batch = {
        "pixel_values": torch.randn(2, 6, 48),
        "pixel_attention_mask": torch.ones(2, 6, dtype=torch.long),
        "spatial_shapes": torch.tensor([[2, 3], [3, 2]]),
    }
    assert [len(hooked.sites.tagged(kind)) for kind in ("input", "hidden", "head", "mlp")] == [1, 4, 2, 2]
    hidden = hooked.sites.tagged("hidden")[1]
    with torch.no_grad(), hooked.tap(read=[hidden]) as tap:
        hooked(batch)
    assert tap.values[str(hidden)].shape == (2, 6, 16)
