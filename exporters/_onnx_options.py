"""What ONNX alone can be told."""

from __future__ import annotations

from pydantic import Field

from edgekd.protocols import Options

__all__ = ["OnnxOptions"]


class OnnxOptions(Options):
    """``[export.onnx]``; see docs/onnx.md."""

    batch: str = Field(
        default="1", description="Batch sizes that the file is for: 1, a list as 1,4,8, or a range as 1..8."
    )
    length: str = Field(
        default="", description="Sizes of a second open axis (a sequence): a list or a range as for batch."
    )
    fuse: bool = Field(
        default=False,
        description="Write attention, biased gelu and residual norms as ONNX Runtime's own fused operators.",
    )
