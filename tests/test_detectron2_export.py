"""What is exported for detectron2 gives there the maps that it gives here.

B images, D width, h, w rows and columns of the patch grid, S side of a window, A heads.
"""

import pytest
import torch
from exporting import export_checkpoint
from references import TINY
from torch.nn import functional as F

from mimae import MIMAEBackbone, MIMAEConfig, MIMAEForPreTraining, MIMAEModel
from mimae.dense.mask_rcnn import MaskRCNNConfig, MaskRCNNForInstanceSegmentation
from mimae.hub.detectron2_vitdet import detectron2_state, save_detectron2
from mimae.hub.export import ExportError

PATCH, HEADS = TINY["patch_size"], TINY["num_attention_heads"]
WINDOWS = {"window_size": 3, "global_attention_indexes": [1]}


class Reading:
    """A state dict under a prefix that notes what was read of it."""

    def __init__(self, state, prefix):
        self.state, self.prefix, self.read = state, prefix, set()

    def __call__(self, name):
        self.read.add(self.prefix + name)
        return self.state[self.prefix + name]

    def layer(self, name):
        return self(f"{name}.weight"), self(f"{name}.bias")


def detectron2_attention(x, get, block):
    """detectron2's `Attention` of tokens (B, h, w, D), a query at a time for the relative positions."""
    batch, height, width, dim = x.shape
    qkv = F.linear(x, *get.layer(f"{block}.attn.qkv")).reshape(batch, height * width, 3, HEADS, dim // HEADS)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, A, h·w, D/A) each
    scores = (q * (dim // HEADS) ** -0.5) @ k.transpose(-2, -1)
    if f"{get.prefix}{block}.attn.rel_pos_h" in get.state:
        rows, columns = get(f"{block}.attn.rel_pos_h"), get(f"{block}.attn.rel_pos_w")
        assert len(rows) == 2 * height - 1
        assert len(columns) == 2 * width - 1
        for query in range(height * width):
            for key in range(height * width):
                vertical = rows[query // width - key // width + height - 1]
                horizontal = columns[query % width - key % width + width - 1]
                scores[:, :, query, key] += q[:, :, query] @ (vertical + horizontal)
    x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, height, width, dim)
    return F.linear(x, *get.layer(f"{block}.attn.proj"))


def detectron2_in_windows(x, get, block, side):
    """The same, window by window, each filled up with zeros."""
    height, width = x.shape[1:3]
    output = torch.zeros_like(x)
    for top in range(0, height, side):
        for left in range(0, width, side):
            tile = x[:, top : top + side, left : left + side]
            rows, columns = tile.shape[1:3]
            window = x.new_zeros(len(x), side, side, x.shape[3])
            window[:, :rows, :columns] = tile
            attended = detectron2_attention(window, get, block)
            output[:, top : top + rows, left : left + columns] = attended[:, :rows, :columns]
    return output


def detectron2_vit(get, images, depth, window_size, global_blocks):
    """detectron2's `ViT`: (B, C, H, W) → its last map (B, D, h, w)."""
    x = F.conv2d(images, *get.layer("patch_embed.proj"), stride=PATCH).permute(0, 2, 3, 1)  # (B, h, w, D)
    width = x.shape[-1]
    x = x + get("pos_embed")[:, 1:].reshape(1, *x.shape[1:])
    for i in range(depth):
        block = f"blocks.{i}"
        normed = F.layer_norm(x, [width], *get.layer(f"{block}.norm1"), eps=1e-6)
        if i in global_blocks:
            x = x + detectron2_attention(normed, get, block)
        else:
            x = x + detectron2_in_windows(normed, get, block, window_size)
        normed = F.layer_norm(x, [width], *get.layer(f"{block}.norm2"), eps=1e-6)
        hidden = F.gelu(F.linear(normed, *get.layer(f"{block}.mlp.fc1")))
        x = x + F.linear(hidden, *get.layer(f"{block}.mlp.fc2"))
    return x.permute(0, 3, 1, 2)


def detectron2_pyramid(get, x):
    """detectron2's `SimpleFeaturePyramid` with norm="LN" and a LastLevelMaxPool, of patches of 4 pixels."""

    def norm(x, name):
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        weight, bias = (each[:, None, None] for each in get.layer(name))
        return (x - mean) / (variance + 1e-6).sqrt() * weight + bias

    def convolutions(x, stage, first):
        x = norm(F.conv2d(x, get(f"{stage}.{first}.weight")), f"{stage}.{first}.norm")
        return norm(F.conv2d(x, get(f"{stage}.{first + 1}.weight"), padding=1), f"{stage}.{first + 1}.norm")

    def twice(x, name):
        return F.conv_transpose2d(x, *get.layer(name), stride=2)

    four_times = twice(F.gelu(norm(twice(x, "simfp_0.0"), "simfp_0.1")), "simfp_0.3")
    maps = [
        convolutions(four_times, "simfp_0", 4),
        convolutions(twice(x, "simfp_1.0"), "simfp_1", 1),
        convolutions(x, "simfp_2", 0),
        convolutions(F.max_pool2d(x, 2), "simfp_3", 1),
    ]
    return [*maps, maps[-1][:, :, ::2, ::2]]


def randomised(model):
    """In evaluation mode; zeros and ones of a new model would hide where they are used."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_an_exported_backbone_gives_the_same_map_in_detectron2s_vit_padded_windows_included(relative):
    config = MIMAEConfig(**{**TINY, "image_size": 28}, **WINDOWS, use_relative_position_embeddings=relative)
    backbone = randomised(MIMAEBackbone(config))  # a grid of 7 x 7, of which windows of 3 leave a row and a column
    images = torch.randn(2, 3, 28, 28)
    state = detectron2_state(backbone)
    get = Reading(state, "backbone.net.")
    with torch.no_grad():
        expected = detectron2_vit(get, images, depth=2, window_size=3, global_blocks=[1])
        (found,) = backbone(images).feature_maps
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert get.read == set(state)


def test_an_exported_detector_gives_the_same_pyramid_in_detectron2():
    config = MIMAEConfig(**{**TINY, "image_size": 32}, **WINDOWS, use_relative_position_embeddings=True)
    widths = {"pyramid_channels": 8, "box_conv_channels": [8], "box_fc_channels": [8], "mask_conv_channels": [8]}
    model = randomised(MaskRCNNForInstanceSegmentation(MaskRCNNConfig(backbone_config=config, **widths)))
    images = torch.randn(2, 3, 32, 32)
    state = detectron2_state(model)
    net, pyramid = Reading(state, "backbone.net."), Reading(state, "backbone.")
    with torch.no_grad():
        last = detectron2_vit(net, images, depth=2, window_size=3, global_blocks=[1])
        expected = detectron2_pyramid(pyramid, last)
        found = model.pyramid(*model.backbone(images).feature_maps)
    assert [each.shape[-1] for each in found.values()] == [32, 16, 8, 4, 2]
    for ours, theirs in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert net.read | pyramid.read == set(state)


def test_the_command_exports_a_pretrained_encoder_and_leaves_out_what_detectron2_has_no_use_for(tmp_path):
    model = randomised(MIMAEForPreTraining(MIMAEConfig(**TINY)))
    model.save_pretrained(tmp_path / "checkpoint")
    assert export_checkpoint(tmp_path / "checkpoint", tmp_path / "out.pth", "detectron2") <= 1e-5
    checkpoint = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(checkpoint) == ["model"]
    state = checkpoint["model"]
    assert all(name.startswith("backbone.net.") for name in state)
    assert not any(
        part in name for name in state for part in ("cls_token", "decoder", "backbone.net.norm.", "mi_gate")
    )
    weights = [getattr(model.vit.layers[1].attention, f"{part}_proj").weight for part in "qkv"]
    assert torch.equal(state["backbone.net.blocks.1.attn.qkv.weight"], torch.cat(weights))
    assert torch.equal(state["backbone.net.pos_embed"], model.vit.embeddings.position_embeddings)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"image_size": (16, 32)}, "4 x 8 patches"),
        ({"use_relative_position_bias": True}, "use_relative_position_bias"),
        ({"window_size": 5}, "window_size=5"),
    ],
)
def test_what_detectron2s_vit_cannot_be_is_refused_and_nothing_is_written(fields, reason, tmp_path):
    backbone = MIMAEBackbone(MIMAEConfig(**{**TINY, **fields}))
    with pytest.raises(ValueError, match=reason):
        save_detectron2(backbone, tmp_path / "out.pth")
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_positions_that_are_not_square(tmp_path):
    MIMAEModel(MIMAEConfig(**{**TINY, "image_size": (16, 32)})).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match="4 x 8 patches"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out.pth", "detectron2")
    assert not (tmp_path / "out.pth").exists()
