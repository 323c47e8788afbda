"""Architectures for :mod:`edgekd.benchmarks.coverage`: real model code with random weights, small enough for seconds.

Where a model takes its depth and width as arguments, it is made shallow and narrow: its operators, and how they are put
together, are those of the real one. Needs timm, torchvision and transformers, which edgekd itself does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .plain_networks import KeywordSpotter, Recurrent, SuperResolution, TemporalNet, UNet

__all__ = ["ARCHITECTURES", "Architecture"]

Sampler = Callable[[int, torch.Generator], tuple[Tensor, ...]]
"""A count and a source of chance to inputs, samples on the first axis."""


@dataclass(frozen=True)
class Architecture:
    """One row of the coverage table.

    Attributes:
        name: Of the row.
        family: Where its code is from: a package, or ``torch`` for plain modules.
        build: Makes the module, with whatever weights.
        sample: Makes inputs of a kind that the model meets in life.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    sample: Sampler


def _image(size: int, width: int | None = None) -> Sampler:
    """Normalized pictures: large patches of colour under fine grain, (count, 3, size, width)."""

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = (size, width or size)
        coarse = torch.randn(count, 3, 6, 6, generator=generator)
        patches = F.interpolate(coarse, shape, mode="bilinear", align_corners=False)
        return (1.2 * patches + 0.3 * torch.randn(count, 3, *shape, generator=generator),)

    return sample


def _text(length: int = 32, vocabulary: int = 200, *, mask: bool = True) -> Sampler:
    """Token ids and a mask of texts of many lengths, (count, length) each."""

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        ids = torch.randint(3, vocabulary, (count, length), generator=generator)
        lengths = torch.randint(length // 3, length + 1, (count, 1), generator=generator)
        present = (torch.arange(length)[None] < lengths).long()
        return (ids * present, present) if mask else (ids,)

    return sample


def _sound(length: int) -> Sampler:
    """Two tones and noise, (count, length)."""

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        time = torch.arange(length)[None] / 16_000
        tones = 100 + 2000 * torch.rand(2, count, 1, generator=generator)
        return (torch.sin(6.2832 * tones * time).sum(0) + 0.2 * torch.randn(count, length, generator=generator),)

    return sample


def _sequence(*shape: int) -> Sampler:
    """Numbers that drift, (count, *shape)."""

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        steps = torch.randn(count, *shape, generator=generator)
        return (0.5 * steps + 0.5 * steps.roll(1, -1),)

    return sample


def _shallow(build: Callable[[], nn.Module], size: int) -> Callable[[], nn.Module]:
    """The same without repetition: of blocks in a row that keep the shape of what they read, the first one stays."""

    def cut() -> nn.Module:
        module, shapes = build().eval(), {}

        def note(block: nn.Module, inputs: Any, output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                shapes[block] = (inputs[0].shape, output.shape)

        rows = [m for m in module.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
        hooks = [
            block.register_forward_hook(note) for row in rows for block in row if any(True for _ in block.children())
        ]
        with torch.no_grad():
            module(torch.zeros(1, 3, size, size))
        for hook in hooks:
            hook.remove()
        for row in rows:
            kept: list[nn.Module] = []
            last: tuple[type[nn.Module], Any] | None = None
            for block in row:
                before, after = shapes.get(block, (None, 0))
                kind = (type(block), before) if before == after else None
                if kind is None or kind != last:
                    kept.append(block)
                last = kind
            if len(kept) < len(row):
                row._modules = {str(i): block for i, block in enumerate(kept)}
        return module

    return cut


# torchvision


def _torchvision(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **settings)

    return build


def _dense_net() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=16, block_config=(2, 3, 3, 2), num_init_features=32, num_classes=20)


def _vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, num_layers=2, num_heads=3, hidden_dim=96, mlp_dim=192, num_classes=20)


def _torchvision_swin(version: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import swin_transformer as swin

        second = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
        return swin.SwinTransformer(
            [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=20, **(second if version == 2 else {})
        )

    return build


class _FirstOutput(nn.Module):
    """A segmentation network without its auxiliary output, or whatever else has the answer under ``out``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: Tensor) -> Tensor:
        answer: Tensor = self.inner(image)["out"]
        return answer


def _segmentation(name: str) -> Callable[[], nn.Module]:
    return lambda: _FirstOutput(_torchvision(name, weights_backbone=None, num_classes=5)())


class _Detector(nn.Module):
    """Backbone, pyramid and heads: what runs on a device's accelerator; boxes are decoded and sifted by the app."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        answer: dict[str, Tensor] = self.head(list(self.backbone(image).values()))
        return answer


def _pyramid_detector(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import detection

        backbone = detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18",
            weights=None,
            norm_layer=nn.BatchNorm2d,
            returned_layers=[2, 3, 4],
        )
        backbone.fpn = type(backbone.fpn)([128, 256, 512], 64)
        backbone.out_channels = 64
        return _Detector(getattr(detection, kind)(backbone, num_classes=5))

    return build


def _ssd_lite() -> nn.Module:
    from torchvision.models import detection

    return _Detector(detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5))


# timm


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=20, **settings)

    return build


# transformers


class _Hidden(nn.Module):
    """A transformer from ids and mask to the last hidden state, (batch, length, size); zero where no token is.

    Where nothing may be looked at, attention is even in one runtime and something else in another, and nobody reads it.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden * attention_mask[..., None]


class _Only(nn.Module):
    """A model of one input, without what it gives besides its first output."""

    def __init__(self, inner: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.inner, self.settings = inner, settings

    def forward(self, values: Tensor) -> Tensor:
        answer: Tensor = self.inner(values, return_dict=False, **self.settings)[0]
        return answer


class _Boxes(nn.Module):
    """Classes and boxes of a detection transformer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        answer = self.inner(image)
        return answer.logits, answer.pred_boxes


_SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


def _text_model(kind: str, *, decoder: bool = False, **settings: Any) -> Callable[[], nn.Module]:
    """``<kind>Config`` and ``<kind>Model`` of transformers, with the usual sizes unless said otherwise."""

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**settings)
        if decoder:
            config.use_cache = False
        return _Hidden(getattr(transformers, f"{kind}Model")(config))

    return build


def _hugging_face(model: str, config: str, wrap: Callable[..., nn.Module], **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return wrap(getattr(transformers, model)(getattr(transformers, config)(**settings)))

    return build


def _whisper_encoder() -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, max_source_positions=50
    )
    return _Only(WhisperEncoder(config))


_TIMM_SWIN: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "img_size": 64}
_T5: dict[str, Any] = {"vocab_size": 200, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_WAV2VEC: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (32,) * 4,
    "conv_stride": (5, 4, 4, 2),
    "conv_kernel": (10, 8, 4, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}
_CLIP: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_FEW: dict[str, Any] = {"vocab_size": 200, "max_position_embeddings": 64, **_SIZES}

ARCHITECTURES: tuple[Architecture, ...] = (
    # Convolutional networks
    Architecture("resnet18", "torchvision", _shallow(_torchvision("resnet18", num_classes=20), 64), _image(64)),
    Architecture("mobilenet_v2", "torchvision", _shallow(_torchvision("mobilenet_v2", num_classes=20), 64), _image(64)),
    Architecture(
        "mobilenet_v3_small",
        "torchvision",
        _shallow(_torchvision("mobilenet_v3_small", num_classes=20), 64),
        _image(64),
    ),
    Architecture(
        "efficientnet_b0", "torchvision", _shallow(_torchvision("efficientnet_b0", num_classes=20), 64), _image(64)
    ),
    Architecture(
        "shufflenet_v2", "torchvision", _shallow(_torchvision("shufflenet_v2_x0_5", num_classes=20), 64), _image(64)
    ),
    Architecture("squeezenet", "torchvision", _torchvision("squeezenet1_1", num_classes=20), _image(96)),
    Architecture("regnet_y", "torchvision", _shallow(_torchvision("regnet_y_400mf", num_classes=20), 64), _image(64)),
    Architecture("densenet", "torchvision", _dense_net, _image(64)),
    Architecture("mobilenetv4_conv_small", "timm", _shallow(_timm("mobilenetv4_conv_small"), 64), _image(64)),
    Architecture("resnest", "timm", _shallow(_timm("resnest14d"), 64), _image(64)),
    Architecture("convnext", "timm", _timm("convnext_atto", depths=(1, 1, 2, 1)), _image(64)),
    Architecture("convnextv2", "timm", _timm("convnextv2_atto", depths=(1, 1, 2, 1)), _image(64)),
    Architecture("poolformer", "timm", _shallow(_timm("poolformer_s12"), 64), _image(64)),
    # Vision transformers and hybrids
    Architecture("vit_torchvision", "torchvision", _vision_transformer, _image(64)),
    Architecture("vit_tiny", "timm", _timm("vit_tiny_patch16_224", img_size=64, depth=3), _image(64)),
    Architecture("swinv2_torchvision", "torchvision", _torchvision_swin(2), _image(64)),
    Architecture("swin", "timm", _timm("swin_tiny_patch4_window7_224", **_TIMM_SWIN), _image(64)),
    Architecture("mobilevit_xxs", "timm", _shallow(_timm("mobilevit_xxs"), 64), _image(64)),
    Architecture("fastvit", "timm", _timm("fastvit_sa12", layers=(1, 1, 1, 1)), _image(64)),
    Architecture("edgenext", "timm", _shallow(_timm("edgenext_xx_small"), 64), _image(64)),
    Architecture("efficientvit_mit", "timm", _shallow(_timm("efficientvit_b0"), 64), _image(64)),
    Architecture("levit", "timm", _timm("levit_128s", img_size=64, depth=(1, 1, 1)), _image(64)),
    Architecture("pvt_v2", "timm", _timm("pvt_v2_b0", depths=(1, 1, 1, 1)), _image(64)),
    Architecture("eva02", "timm", _timm("eva02_tiny_patch14_224", img_size=56, depth=2), _image(56)),
    Architecture("mixer", "timm", _shallow(_timm("mixer_s32_224", img_size=64), 64), _image(64)),
    # Segmentation and detection
    Architecture("unet", "torch", UNet, _image(64)),
    Architecture("super_resolution", "torch", SuperResolution, _image(32)),
    Architecture("lraspp", "torchvision", _shallow(_segmentation("lraspp_mobilenet_v3_large"), 64), _image(64)),
    Architecture(
        "segformer",
        "transformers",
        _hugging_face(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            _Only,
            depths=(1, 1, 1, 1),
            hidden_sizes=(16, 32, 40, 64),
            decoder_hidden_size=32,
            num_labels=5,
        ),
        _image(64),
    ),
    Architecture("ssdlite", "torchvision", _shallow(_ssd_lite, 96), _image(96)),
    Architecture("fcos", "torchvision", _shallow(_pyramid_detector("FCOS"), 64), _image(64)),
    Architecture(
        "yolos",
        "transformers",
        _hugging_face(
            "YolosForObjectDetection",
            "YolosConfig",
            _Boxes,
            **_CLIP,
            image_size=[64, 64],
            num_detection_tokens=10,
            num_labels=5,
        ),
        _image(64),
    ),
    # Text
    Architecture("bert", "transformers", _text_model("Bert", **_FEW), _text()),
    Architecture(
        "distilbert",
        "transformers",
        _text_model("DistilBert", vocab_size=200, dim=64, n_layers=2, n_heads=4, hidden_dim=128),
        _text(),
    ),
    Architecture(
        "mobilebert",
        "transformers",
        _text_model(
            "MobileBert",
            **_FEW | {"hidden_size": 64, "num_hidden_layers": 3},
            embedding_size=32,
            intra_bottleneck_size=32,
            true_hidden_size=32,
        ),
        _text(),
    ),
    Architecture("albert", "transformers", _text_model("Albert", **_FEW, embedding_size=32), _text()),
    Architecture("mpnet", "transformers", _text_model("MPNet", **_FEW), _text()),
    Architecture("squeezebert", "transformers", _text_model("SqueezeBert", **_FEW, embedding_size=64), _text()),
    Architecture(
        "deberta_v2",
        "transformers",
        _text_model(
            "DebertaV2",
            **_FEW,
            relative_attention=True,
            position_buckets=16,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        ),
        _text(),
    ),
    Architecture(
        "modernbert",
        "transformers",
        _text_model(
            "ModernBert",
            **_FEW,
            local_attention=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            reference_compile=False,
        ),
        _text(),
    ),
    Architecture(
        "t5_encoder",
        "transformers",
        _hugging_face("T5EncoderModel", "T5Config", _Hidden, **_T5),
        _text(),
    ),
    Architecture(
        "clip_text",
        "transformers",
        _hugging_face(
            "CLIPTextModel",
            "CLIPTextConfig",
            _Hidden,
            **_CLIP,
            vocab_size=200,
            max_position_embeddings=32,
            eos_token_id=199,
        ),
        _text(),
    ),
    Architecture(
        "gpt2",
        "transformers",
        _text_model("GPT2", decoder=True, vocab_size=200, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        _text(),
    ),
    Architecture("llama", "transformers", _text_model("Llama", decoder=True, **_FEW, num_key_value_heads=2), _text()),
    # Images and sound of transformers
    Architecture(
        "clip_vision",
        "transformers",
        _hugging_face("CLIPVisionModel", "CLIPVisionConfig", _Only, **_CLIP, image_size=64, patch_size=16),
        _image(64),
    ),
    Architecture("whisper_encoder", "transformers", _whisper_encoder, _sequence(80, 100)),
    Architecture(
        "wav2vec2", "transformers", _hugging_face("Wav2Vec2Model", "Wav2Vec2Config", _Only, **_WAV2VEC), _sound(3200)
    ),
    # Time
    Architecture("lstm", "torch", lambda: Recurrent(nn.LSTM), _sequence(20, 12)),
    Architecture("gru", "torch", lambda: Recurrent(nn.GRU), _sequence(20, 12)),
    Architecture("temporal_net", "torch", TemporalNet, _sequence(40, 12)),
    Architecture("keyword_spotter", "torch", KeywordSpotter, _sequence(49, 10)),
)
